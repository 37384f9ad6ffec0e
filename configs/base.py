"""Every field and its default; each experiment starts from here and changes what it needs.

Numbers are shares in [0, 1], seconds, tokens or counts, as the name says. The comment of a
field, behind it or on the lines above it, is what `launch.py --config.help` prints, beside the
range or the choices that awf/config.py holds it to.
"""

from ml_collections import ConfigDict


def base_config() -> ConfigDict:
  """The default configuration; `configs/NAME.py:get_config` returns a changed copy."""
  c = ConfigDict()
  c.seed = 0  # of everything that is drawn
  c.name = "base"  # of the experiment: DIR defaults to runs/NAME
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
          family="qwen2",  # QKV bias (qwen2), or QK-norm (qwen3)
          vocab_size=0,  # 0 = the checkpoint says it all
          hidden_size=256,  # width of the residual stream
          intermediate_size=640,  # width of the feed-forward part
          num_hidden_layers=4,  # layers
          num_attention_heads=4,  # query heads
          num_key_value_heads=2,  # heads of keys and values; divides the query heads
          head_dim=64,  # numbers of one head
          rope_theta=1e6,  # base of the rotary positions
          tie_word_embeddings=True,  # the head is the embedding
          max_position_embeddings=4096,  # longest context, tokens
        )
      ),
    )
  )
  c.lora = ConfigDict(
    dict(
      rank=16,  # of each pair of LoRA matrices
      alpha=32.0,  # the adapter counts alpha / rank
      # the linear layers that get an adapter
      targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
      rslora=False,  # scale alpha / sqrt(rank) instead of alpha / rank
      init_path="",  # a PEFT adapter to start from
      paths=(),  # NAME=DIR: further PEFT adapters beside the policy's, chosen by name (generate)
    )
  )
  # The policy's sampling, and the shape of the engine that the executor shares.
  c.sampler = ConfigDict(
    dict(
      temperature=1.0,  # of proposals; 0 = always the likeliest token
      top_p=1.0,  # smallest set of tokens with this probability; 1 = all
      top_k=0,  # the k likeliest tokens; 0 = all
      min_p=0.0,  # least probability as a share of the likeliest token's; 0 = off
      max_new_tokens=512,  # of a proposal
      rows=32,  # decode rows; strict mode: the one row shape
      context=2048,  # prompt + completion, tokens
      prefill_rows=8,  # prompts that one prefill takes
      steps_per_dispatch=16,  # decode steps between looks at what has arrived
      queue=8192,  # completions that may wait for a row; who asks for more waits
      prompt_cache_gb=0.0,  # keys and values of prompts; 0 = what all rows need, at most 1.5
      strict=True,  # one row shape, bit-equal rows; off: a second one for few rows
    )
  )
  # How workflows call the model (adapter off).
  c.executor = ConfigDict(
    dict(
      temperature=1.0,  # as in sampler
      top_p=1.0,  # as in sampler
      top_k=0,  # as in sampler
      min_p=0.0,  # as in sampler
      max_new_tokens=256,  # of an answer
      # package.module:Class of your own that answers in the place of the base; "" = the base
      client="",
      system="",  # system message of every call; "" = none
      concurrency=64,  # problems that a workflow works on at a time
      # An OpenAI-compatible endpoint that answers workflows instead of the local model.
      remote=ConfigDict(
        dict(
          url="",  # http(s)://HOST/v1; "" = the local model
          model="",  # its name of the model
          key_env="OPENAI_API_KEY",  # environment variable with the key; "" = no key is sent
          timeout=120.0,  # seconds of a try
          retries=6,  # further tries, with growing waits; Retry-After is honoured
          concurrency=16,  # requests in flight
          requests_per_minute=0,  # in any minute; 0 = no limit
          tokens_per_minute=0,  # prompt and completion, in any minute; 0 = no limit
        )
      ),
      prices=(0.0, 0.0),  # USD of a million prompt and of a million generated tokens
    )
  )
  c.task = ConfigDict(
    dict(
      # aime, gsm8k, math, humaneval, mbpp, hotpotqa, drop, nano; package.module:Class of your own
      name="aime",
      # JSON or JSON lines, hf://datasets/OWNER/NAME/FILE, or a folder with AFlow's file names;
      # "" downloads from the data set's home
      path="",
      test_path="",  # for a data set that comes split
      limit=0,  # use the first n problems; 0 = all
      split_seed=42,  # of the split into validation and test
      validation_share=0.8,  # of the problems, for search and training; the rest is the test split
    )
  )
  c.sandbox = ConfigDict(
    dict(
      workers=0,  # runnable children at a time; 0 = cores
      max_children=64,  # jailed processes at a time, those that wait for the model included
      cpu_seconds=10.0,  # processor time of one program or workflow
      wall_seconds=30.0,  # time that it may run, waiting for the model not counted
      memory_mb=512,  # memory of one of them
      output_bytes=1_000_000,  # longest answer of one of them
      max_calls=32,  # model calls of one workflow on one problem
      preload_numeric=True,  # numpy and sympy for programs
      allow_weak=False,  # run model code even where the host cannot confine it
    )
  )
  c.search = ConfigDict(
    dict(
      # dataset: one workflow for all problems; problem: a search for each problem (train.problems)
      scope="dataset",
      # scope="problem": runs of a workflow on its problem; one when executor.temperature is 0
      draws=4,
      # of parents: aflow (soft mixture), uct, puct (prior: the mixture over an arm's score)
      selection="aflow",
      rounds=10,  # steps of expansion; each proposes for `parents` nodes
      parents=4,  # nodes expanded at once (groups of a GRPO batch)
      sample=4,  # AFlow's pool size for the soft mixture
      mix_lambda=0.3,  # aflow: share of the uniform part of the mixture
      mix_alpha=0.2,  # aflow: how much a better score counts in the rest
      uct_c=1.0,  # exploration constant of uct and puct
      uct_adapt=False,  # uct_c times the standard deviation of the scores
      # a search ends when the mean of its best three did not move (by more than z standard errors)
      # in so many rounds, AFlow's rule with 5; 0 = never
      converge_rounds=0,
      converge_z=0.0,  # standard errors that count as no move
      max_calls=0,  # model calls of a search, proposals included; 0 = no limit
      max_tokens=0,  # generated tokens of a search; 0 = no limit
      prompt="full",  # full (any chat model), compact (the nano model's)
      # offered to the optimiser, by name or as package.module:Class of your own; () = those of the
      # data set's kind
      operators=(),
      # turns in which a proposal that fails a check or its smoke run may be repaired; the repaired
      # workflow enters the tree, the reward stays that of the first try
      repairs=0,
      logs=3,  # failure log entries shown to the optimiser
      experience=8,  # experience lines shown to the optimiser
      smoke_problems=1,  # problems of the smoke run; a proposal that breaks on one goes no further
      subset_problems=8,  # common problems of a group, for the reward
      full_problems=0,  # full validation of survivors; 0 = all validation problems
      full_top=4,  # children per round that go on to full validation
      # common problems by solve rate: none (from all), easy_first, hard_first
      curriculum="none",
      curriculum_share=0.5,  # part of the problems in the first round; all are in at the last
      starts="",  # JSON lines {graph, prompt}: further start workflows beside the seed
      workspace="",  # a workspace of AFlow to continue; it is copied, never changed
      start_share=0.0,  # share of the parents of a round taken from the start workflows
      driver="awf",  # who runs the search: awf, or a checkout of AFlow (mode search)
      # An OpenAI-compatible endpoint that proposes edits instead of the policy (mode search).
      remote=ConfigDict(
        dict(
          url="",  # http(s)://HOST/v1; "" = the local model
          model="",  # its name of the model
          key_env="OPENAI_API_KEY",  # environment variable with the key; "" = no key is sent
          timeout=120.0,  # seconds of a try
          retries=6,  # further tries, with growing waits; Retry-After is honoured
          concurrency=16,  # requests in flight
          requests_per_minute=0,  # in any minute; 0 = no limit
          tokens_per_minute=0,  # prompt and completion, in any minute; 0 = no limit
        )
      ),
      prices=(0.0, 0.0),  # USD of a million prompt and of a million generated tokens
    )
  )
  # Upstream AFlow as the search's driver (search.driver=aflow).
  c.aflow = ConfigDict(
    dict(
      path="",  # a checkout of FoundationAgents/AFlow; it is not changed
      python="",  # interpreter with the packages of its requirements.txt; "" = this one
      validation_rounds=1,  # evaluations of a workflow, averaged
    )
  )
  # What a proposal earns, by the stage that it reaches.
  c.reward = ConfigDict(
    dict(
      parse=0.0,  # it cannot be parsed
      static=0.05,  # it fails the static check
      smoke=0.1,  # it fails the smoke run
      runs=0.2,  # it runs: this, and
      score=0.8,  # this times its mean score
      function="",  # package.module:function of your own that has the last word; "" = none
    )
  )
  c.grpo = ConfigDict(
    dict(
      group_size=8,  # proposals for one parent
      # grpo, dr_grpo, batch, rloo, reinforce_plus_plus_baseline, maxrl, opo; gae (a critic)
      advantage="grpo",
      std_eps=1e-4,  # added to a group's standard deviation
      gamma=1.0,  # gae: discount of a token
      lam=0.95,  # gae: weight of longer returns
      value_clip=0.5,  # gae: how far a value may move on one batch
      loss="grpo",  # grpo (ppo is the same), gspo, cispo, sapo, reinforce
      clip_low=0.2,  # the ratio counts from 1 - clip_low
      clip_high=0.28,  # to 1 + clip_high
      dual_clip=0.0,  # bounds the loss at negative advantages (3 is usual); 0 = off
      ratio_max=0.0,  # upper bound of the unclipped ratio; 0 = off
      cispo_max=5.0,  # cispo: upper bound of the ratio
      sapo_tau_pos=1.0,  # sapo: temperature at positive advantages
      sapo_tau_neg=1.05,  # sapo: temperature at negative ones
      beta=0.0,  # weight of the KL to the base (adapter off)
      kl="k3",  # its estimate
      kl_in="loss",  # where it counts
      entropy_coef=0.0,  # bonus on the mean entropy
      entropy_target=0.0,  # nats; above 0 the coefficient adapts towards it
      entropy_delta=0.005,  # step of the adaptive coefficient
      entropy_min=0.0,  # the adaptive coefficient stays above
      entropy_max=1.0,  # and below
      # correction for the sampler's log-probs: none, token_truncate, token_mask,
      # sequence_truncate, sequence_mask
      importance="none",
      importance_min=0.0,  # smallest weight of the correction
      importance_max=3.0,  # largest weight
      aggregation="token_mean",  # of the tokens' losses over the batch
      horizon=0,  # longest completion, tokens; 0 = sampler.max_new_tokens
      overlong_buffer=0,  # the reward falls over the last tokens of the horizon; 0 = off
      overlong_penalty=1.0,  # by this much at the horizon
      mask_truncated=False,  # completions that were cut off do not count
      drop_uniform=False,  # groups whose rewards are all alike do not count in the aggregation
      refill=0,  # groups a round that are proposed again because their rewards were all alike
      steps_per_batch=1,  # optimiser steps on one batch, all clipped against the same old log-probs
      micro_batch=8,  # rows of one forward/backward pass
      vocab_chunk=4096,  # positions x vocabulary never exists: tokens per chunk of the head
      # none, full (the backward pass computes every layer again), or a policy of jax.checkpoint by
      # name, for instance dots_with_no_batch_dims
      remat="none",
    )
  )
  c.optim = ConfigDict(
    dict(
      learning_rate=1e-5,  # of AdamW, at its height
      schedule="constant",  # of the learning rate after the warm-up
      warmup_steps=0,  # steps over which it rises from 0
      total_steps=0,  # for cosine and linear; 0 = what the run will do
      weight_decay=0.0,  # of AdamW
      b1=0.9,  # decay of the mean of the gradients
      b2=0.99,  # decay of the mean of their squares
      eps=1e-8,  # added to the root of the squares
      grad_clip=1.0,  # largest global norm of a gradient; 0 = no limit
      critic_learning_rate=1e-4,  # of the value head (grpo.advantage=gae)
    )
  )
  c.train = ConfigDict(
    dict(
      epochs=1,  # epochs of `episodes` searches
      episodes=1,  # searches per epoch
      problems=0,  # search.scope="problem": problems that an episode takes; 0 = all
      checkpoint_every=1,  # rounds
      keep_checkpoints=2,  # newest checkpoints that are kept
      minutes=0.0,  # wall-time limit; 0 = none
      nonfinite_limit=3,  # rounds in a row whose loss or gradient is no number; then the run stops
    )
  )
  c.eval = ConfigDict(
    dict(
      samples=4,  # per problem, for pass@k
      pass_k=(1, 2, 3, 4),  # every k of pass@k
      votes=5,  # answers that self-consistency takes the most frequent of
      problems=0,  # 0 = the whole test split
      parents="",  # JSON lines {graph, prompt}: held-out parents of the before/after comparison
      parent_count=0,  # 0 = no before/after comparison
      proposals_per_parent=8,  # proposals that are drawn for each of them
      # problems that score these proposals; from the validation split, never trained on
      parent_problems=16,
      bootstrap=2000,  # resamples of an interval
    )
  )
  # Devices by what is spread over them; the product is the number of devices.
  c.mesh = ConfigDict(
    dict(
      data=-1,  # rows of a batch; -1 = what is left
      fsdp=1,  # weights, gathered where they are used
      tensor=1,  # heads and widths of a layer
    )
  )
  # Several processes as one run (modes train, search, eval); each is started with this config.
  c.distributed = ConfigDict(
    dict(
      # HOST:PORT of process 0; auto = TPU pod, SLURM, Open MPI, Kubernetes say it; "" = what
      # JAX_COORDINATOR_ADDRESS says, or one process
      coordinator="",
      num_processes=0,  # with HOST:PORT; 0 = JAX_NUM_PROCESSES
      process_id=-1,  # with HOST:PORT; -1 = JAX_PROCESS_ID
      timeout=60.0,  # seconds without a sign of life after which a process counts as lost
    )
  )
  c.sft = ConfigDict(
    dict(
      path="",  # JSON lines {prompt, response} or {messages, response}
      weights="lora",  # what is trained
      steps=1000,  # optimiser steps
      batch=32,  # rows of a step
      length=512,  # tokens of a row
      prompt_weight=0.0,  # loss weight of prompt tokens
      save="",  # directory for the trained checkpoint or adapter; "" = DIR/model
      save_dtype="float32",  # of a trained checkpoint
      log_every=20,  # steps between rows of metrics
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
    dict(
      sampling="config",  # config.sampler's, or the checkpoint's generation_config.json
    )
  )
  c.serve = ConfigDict(
    dict(
      host="127.0.0.1",  # 0.0.0.0 for all interfaces
      port=8000,  # 0 takes a free one
      model_name="",  # of the base; "" = the last part of model.path; adapters: lora.paths' names
      api_key="",  # bearer token; "" = that of the environment's AWF_API_KEY; none = open
      cors=(),  # web origins that browsers may call from; none = no CORS
      max_body_mb=8.0,  # of a request
      shutdown_seconds=30.0,  # for answers that are under way when it is stopped
    )
  )
  c.bench = ConfigDict(
    dict(
      what="sampler",  # the part that is measured
      batch=16,  # rows: prompts x group
      prompt=128,  # tokens of a prompt
      new=128,  # tokens of a completion
      group=1,  # completions of one prompt
      lengths="fixed",  # fixed, mixed (1/8 to all of prompt and new), or A-B: tokens, as 32-256
      repeats=5,  # measurements, after a first one that compiles
      weights="checkpoint",  # random: of model.path's shapes, so that nothing is downloaded
    )
  )
  c.plan = ConfigDict(
    dict(
      target="v5e-1",  # v5e-1, v5e-4, v5e-8, v6e-1, v6e-8, v5p-8, h200 (counted), cpu, local
      programs=("sampler", "update", "logprobs"),  # what is compiled
      prompt=0,  # tokens of a proposal's prompt; 0 = what sampler.context leaves
      new=0,  # tokens of a proposal; 0 = sampler.max_new_tokens
      problem_prompt=512,  # tokens of a workflow's call
      calls=1,  # calls of a workflow on one problem
      reserve_gb=0.75,  # GiB left to the runtime
      fast=False,  # compile 2 and 4 layers and extrapolate, instead of the whole model
      trials=4,  # programs of changed configs that are compiled when this one does not fit
    )
  )
  c.backup = ConfigDict(
    dict(
      path="",  # directory for backups; "" = awf in a mounted Google Drive (Colab), or off
      keep=2,  # newest backups of a run that are kept
      restore="",  # where a run that DIR lacks comes from: a backup, its folder, all; auto = path
      wait=60.0,  # seconds that the end of a run waits for its last backup
    )
  )
  return c
