"""What ``lightning-drm --help`` shows: the subcommands with an example each. Nothing heavy is imported for it."""

SUBCOMMANDS = ("fit", "collect", "merge", "test", "compare", "tune", "analyze")

OVERVIEW = """\
usage: lightning-drm [-h] [--version] {fit,collect,merge,test,compare,tune,analyze} ...

Finetune several tasks from one base, merge the finetunes into one multitask model, and test it.

subcommands:
  fit     Finetune every task from the same base, then merge and test. Tasks that the run folder already has
          are not trained again.
            lightning-drm fit --config configs/quickstart.yaml

  collect Take statistics of the training data of finished tasks, which RegMean, Fisher and WUDI's input_weight
          need. No training; `fit` does it by itself where the configured method needs them.
            lightning-drm collect --config configs/quickstart.yaml --drm.statistics '[gram]'

  merge   Merge finetunes with any method. No training. It has two forms:
          from a run: merge again what `fit` stored, with the run's configuration, then test the result.
            lightning-drm merge --config configs/quickstart.yaml --drm.method TIES --drm.method.density 0.3
          from files: merge models, adapters and checkpoints that are on disk or on the hub.
            lightning-drm merge --base BASE --models.sst2 PATH --models.rte PATH --output DIR

  test    Measure the base, every finetune and the merged model of a run again.
            lightning-drm test --config configs/quickstart.yaml

  compare Merge a run's tasks with several methods, and show their scores side by side. No training.
            lightning-drm compare --config configs/quickstart.yaml --methods DRM TIES TSVM

  tune    Search for the best method, density and coefficients on the validation sets, or learn coefficients
          there (--search gradient), and test the best once.
            lightning-drm tune --config configs/quickstart.yaml --methods DRM TIES

  analyze Study the stored deltas: tables and figures, each with what it says in one sentence. No training.
            lightning-drm analyze --config configs/quickstart.yaml --only spectrum

where a configuration comes from:
  --config FILE     A YAML file. Start from configs/quickstart.yaml.
  --config OVERLAY  Further files lie over the earlier ones: configs/method/*.yaml, configs/strategy/*.yaml.
  --any.option VALUE
                    Any entry of the file, by its path: --trainer.max_steps 50. What comes last wins. A class
                    that replaces another one, such as --drm.method TIES, starts from its own defaults.
  --print_config    After a subcommand: print the whole configuration, and do nothing else.

options:
  -h, --help        Show this text. `lightning-drm fit --help` lists the options of fit, and so on.
  --version         Show the version.
"""

MERGE_FORMS = """\
`lightning-drm merge` has two forms. It merges files if --base, --models or --output is given, as an option or in a
configuration file; otherwise it merges a run again. Their options follow, first those for files, then those for a run.

  from files: models, adapters and checkpoints that are on disk or on the hub
    lightning-drm merge --base BASE --models.sst2 PATH --models.rte PATH --output DIR
  from a run: what `fit` stored, with the run's configuration; tests the result
    lightning-drm merge --config configs/quickstart.yaml --drm.method TIES --drm.method.density 0.3
"""
