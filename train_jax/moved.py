"""Old import paths of modules that have moved. They still work, with a DeprecationWarning.

They will be removed in the release after next.
"""

from train_jax.core.moved_modules import install

install(
    "train_jax",
    """
adamw_8bit                         optim.adamw_8bit
bad_rows                           core.row_errors
checkpoint_files                   checkpoints.metadata
checkpoint_trees                   checkpoints.trees
clock                              system.clock
command_line                       config.command_line
complete                           completed_run
core.picture_folders               core.formats.image_folders
core.tfds                          core.formats.tfds
disk                               system.disk
distributed                        parallel.distributed
durations                          config.durations
errors                             core.errors
evaluation                         evaluate
files                              core.files
flops                              plan.flops
hlo                                plan.hlo
host_memory                        system.host_memory
input                              data.pipeline
interrupt                          system.interrupt
memory                             system.memory
metrics                            core.metrics
model_state                        step.placement
optimizers                         optim.optimizers
order                              data.shuffle
params                             core.param_tree
patterns                           core.patterns
plan.programs                      plan.planning
plan_report                        plan.report
plots                              report.plots
ranking                            checkpoints.best_metric
reporting                          report.reporter
resume                             config.resume_check
session                            run_state
sharding                           parallel.sharding
startup                            report.startup
state                              step.train_state
sweep_plot                         sweep.plot
sweep_report                       sweep.report
tfds_source                        core.formats.tfds
training_step                      step.train_step
untrained                          evaluate_only
validation                         config.validate
""",
    """
report.startup  KINDS  ARRAY_KINDS
""",
)
