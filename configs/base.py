"""Every field and its default; each experiment starts from here and changes what it needs.

Numbers are shares in [0, 1], seconds, tokens or counts, as the name says.
"""

from ml_collections import ConfigDict


def base_config() -> ConfigDict:
  """The default configuration; `configs/NAME.py:get_config` returns a changed copy."""
  c = ConfigDict()
  c.seed = 0
  c.name = "base"
  # Metrics of your own, "package.module:function"; each maps a round's rollouts to {name: number}.
  c.metrics = ()

  c.model = ConfigDict(
    dict(
      path="",  # Hugging Face directory (or hub id); "" only where a config says so
      dtype="auto",  # stored dtype of the base: auto = float32 on CPU, bfloat16 elsewhere
      compute_dtype="auto",  # auto = float32 on CPU, bfloat16 elsewhere
      quant="none",  # none, int8 (per output channel), int4 (by groups); the base is frozen then
      quant_group=128,  # int4: inputs that share a scale
      quant_embedding=True,  # int8 embedding and head too; False leaves them in dtype
      policy="awf.policy:QwenPolicy",  # package.module:Class; a subclass of it of your own
      tokenizer="",  # directory or .model file; "" = the checkpoint's own
      # Only for a model made from nothing (mode sft, empty path): fields of
      # awf.qwen.config.QwenConfig.
      architecture=ConfigDict(
        dict(
          family="qwen2",
          vocab_size=0,  # 0 = the checkpoint says it all
          hidden_size=256,
          intermediate_size=640,
          num_hidden_layers=4,
          num_attention_heads=4,
          num_key_value_heads=2,
          head_dim=64,
          rope_theta=1e6,
          tie_word_embeddings=True,
          max_position_embeddings=4096,
        )
      ),
    )
  )
  c.lora = ConfigDict(
    dict(
      rank=16,
      alpha=32.0,
      targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
      rslora=False,  # scale alpha / sqrt(rank) instead of alpha / rank
      init_path="",  # a PEFT adapter to start from
      paths=(),  # NAME=DIR: further PEFT adapters beside the policy's, chosen by name (generate)
    )
  )
  # The policy's sampling, and the shape of the engine that the executor shares.
  c.sampler = ConfigDict(
    dict(
      temperature=1.0,
      top_p=1.0,
      top_k=0,
      min_p=0.0,  # least probability as a share of the likeliest token's; 0 = off
      max_new_tokens=512,  # of a proposal
      rows=32,  # decode rows; strict mode: the one row shape
      context=2048,  # prompt + completion, tokens
      prefill_rows=8,
      steps_per_dispatch=16,
      queue=8192,  # completions that may wait for a row; who asks for more waits
      prompt_cache_gb=0.0,  # keys and values of prompts; 0 = what all rows need, at most 1.5
      strict=True,  # one row shape, bit-equal rows; off: a second one for few rows
    )
  )
  # How workflows call the model (adapter off).
  c.executor = ConfigDict(
    dict(
      temperature=1.0,
      top_p=1.0,
      top_k=0,
      min_p=0.0,
      max_new_tokens=256,
      system="",
      concurrency=64,
    )
  )
  c.task = ConfigDict(
    dict(
      name="aime",  # aime, gsm8k, humaneval, nano; or package.module:Class of your own
      path="",  # local JSON or JSON lines; "" downloads from the data set's home
      test_path="",  # for a data set that comes split
      limit=0,  # use the first n problems; 0 = all
      split_seed=42,
      validation_share=0.8,
    )
  )
  c.sandbox = ConfigDict(
    dict(
      workers=0,  # runnable children at a time; 0 = cores
      max_children=64,
      cpu_seconds=10.0,
      wall_seconds=30.0,
      memory_mb=512,
      output_bytes=1_000_000,
      max_calls=32,
      preload_numeric=True,  # numpy and sympy for programs
      allow_weak=False,
    )
  )
  c.search = ConfigDict(
    dict(
      scope="dataset",  # dataset
      selection="aflow",  # aflow (soft mixture), uct
      rounds=10,  # expansions steps; each proposes for `parents` nodes
      parents=4,  # nodes expanded at once (groups of a GRPO batch)
      sample=4,  # AFlow's pool size for the soft mixture
      mix_lambda=0.3,
      mix_alpha=0.2,
      uct_c=1.0,
      prompt="full",  # full (any chat model), compact
      logs=3,  # failure log entries shown to the optimiser
      experience=8,  # experience lines shown to the optimiser
      smoke_problems=1,
      subset_problems=8,  # common problems of a group, for the reward
      full_problems=0,  # full validation of survivors; 0 = all validation problems
      full_top=2,  # children per round that go on to full validation
      starts="",  # JSON lines {graph, prompt}: further start workflows beside the seed
      start_share=0.0,  # share of the parents of a round taken from the start workflows
      driver="awf",
    )
  )
  c.reward = ConfigDict(
    dict(parse=0.0, static=0.05, smoke=0.1, runs=0.2, score=0.8)
  )  # ALGORITHMS.md's table: fails parsing, fails the check, fails smoke, runs + score x mean
  c.grpo = ConfigDict(
    dict(
      group_size=8,
      # grpo, dr_grpo, batch, rloo, reinforce_plus_plus_baseline, maxrl, opo; gae (a critic)
      advantage="grpo",
      std_eps=1e-4,
      gamma=1.0,  # gae: discount of a token
      lam=0.95,  # gae: weight of longer returns
      value_clip=0.5,  # gae: how far a value may move on one batch
      loss="grpo",  # grpo (ppo is the same), gspo, cispo, sapo, reinforce
      clip_low=0.2,
      clip_high=0.28,
      dual_clip=0.0,  # bounds the loss at negative advantages (3 is usual); 0 = off
      ratio_max=0.0,  # upper bound of the unclipped ratio; 0 = off
      cispo_max=5.0,
      sapo_tau_pos=1.0,
      sapo_tau_neg=1.05,
      beta=0.0,  # KL to the base (adapter off)
      kl="k3",  # k1, k2, k3
      kl_in="loss",  # loss, reward
      entropy_coef=0.0,
      entropy_target=0.0,  # nats; above 0 the coefficient adapts towards it
      entropy_delta=0.005,  # step of the adaptive coefficient
      entropy_min=0.0,
      entropy_max=1.0,
      # correction for the sampler's log-probs: none, token_truncate, token_mask,
      # sequence_truncate, sequence_mask
      importance="none",
      importance_min=0.0,
      importance_max=3.0,
      aggregation="token_mean",  # token_mean, sequence_mean, sequence_sum, constant
      horizon=0,  # longest completion, tokens; 0 = sampler.max_new_tokens
      overlong_buffer=0,  # the reward falls over the last tokens of the horizon; 0 = off
      overlong_penalty=1.0,  # by this much at the horizon
      mask_truncated=False,
      drop_uniform=False,  # groups whose rewards are all alike do not count in the aggregation
      refill=0,  # groups a round that are proposed again because their rewards were all alike
      steps_per_batch=1,  # optimiser steps on one batch, all clipped against the same old log-probs
      micro_batch=8,  # rows of one forward/backward pass
      vocab_chunk=4096,  # positions x vocabulary never exists: tokens per chunk of the head
      remat="none",  # none, full (the backward pass computes every layer again), or a policy of
      # jax.checkpoint by name, for instance dots_with_no_batch_dims
    )
  )
  c.optim = ConfigDict(
    dict(
      learning_rate=1e-5,
      schedule="constant",  # constant, cosine, linear
      warmup_steps=0,
      total_steps=0,  # for cosine and linear; 0 = what the run will do
      weight_decay=0.0,
      b1=0.9,
      b2=0.99,
      eps=1e-8,
      grad_clip=1.0,
      critic_learning_rate=1e-4,  # of the value head (grpo.advantage=gae)
    )
  )
  c.train = ConfigDict(
    dict(
      epochs=1,
      episodes=1,  # searches per epoch
      problems=0,  # scope="problem" only
      checkpoint_every=1,  # rounds
      keep_checkpoints=2,
      minutes=0.0,  # wall-time limit; 0 = none
      nonfinite_limit=3,  # rounds in a row whose loss or gradient is no number; then the run stops
    )
  )
  c.eval = ConfigDict(
    dict(
      samples=4,  # per problem, for pass@k and self-consistency
      pass_k=(1, 4),
      problems=0,  # 0 = the whole test split
      parents="",  # JSON lines {graph, prompt}: held-out parents of the before/after comparison
      parent_count=0,  # 0 = no before/after comparison
      proposals_per_parent=8,
      # problems that score these proposals; from the validation split, never trained on
      parent_problems=16,
      bootstrap=2000,
    )
  )
  c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
  c.sft = ConfigDict(
    dict(
      path="",  # JSON lines {prompt, response} or {messages, response}
      weights="lora",  # lora, all
      steps=1000,
      batch=32,
      length=512,
      pack=True,
      prompt_weight=0.0,  # loss weight of prompt tokens
      save="",  # directory for the trained checkpoint or adapter; "" = DIR/model
      save_dtype="float32",
      log_every=20,
    )
  )
  c.export = ConfigDict(
    dict(
      format="peft",  # peft, merged (base + adapter as a Hugging Face checkpoint)
      path="",  # directory to write; "" = DIR/peft or DIR/merged
      dtype="auto",  # of merged weights; auto = the base's own
      shard_bytes=4 * 2**30,  # largest weight file of a merged checkpoint
    )
  )
  c.generate = ConfigDict(
    dict(sampling="config")  # config.sampler's, or the checkpoint's generation_config.json
  )
  c.serve = ConfigDict(
    dict(
      host="127.0.0.1",  # 0.0.0.0 for all interfaces
      port=8000,  # 0 takes a free one
      model_name="",  # of the base; "" = the last part of model.path; adapters: lora.paths' names
      api_key="",  # bearer token; "" = that of the environment's AWF_API_KEY; none = open
      cors=(),  # web origins that browsers may call from; none = no CORS
      max_body_mb=8.0,
      shutdown_seconds=30.0,  # for answers that are under way when it is stopped
    )
  )
  c.bench = ConfigDict(
    dict(what="sampler", batch=16, prompt=128, new=128, group=1, lengths="fixed", repeats=5)
  )  # what: sampler, update, workflow; lengths: fixed, mixed (1/8 to all of prompt and new), 32-256
  c.plan = ConfigDict(
    dict(
      target="v5e-1",  # v5e-1, v5e-4, v5e-8, v6e-1, v6e-8, v5p-8, h200 (counted), cpu, local
      programs=("sampler", "update", "logprobs"),
      prompt=0,  # tokens of a proposal's prompt; 0 = what sampler.context leaves
      new=0,  # tokens of a proposal; 0 = sampler.max_new_tokens
      problem_prompt=512,  # tokens of a workflow's call
      calls=1,  # calls of a workflow on one problem
      reserve_gb=0.75,  # GiB left to the runtime
      fast=False,  # compile 2 and 4 layers and extrapolate, instead of the whole model
      trials=4,  # programs of changed configs that are compiled when this one does not fit
    )
  )
  c.backup = ConfigDict(dict(path="", keep=2))
  return c
