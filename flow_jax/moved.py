"""Where the modules of flow_jax were before the packages were laid out anew: import paths of before still work.

They give a DeprecationWarning, and go with the release after the next.
"""

from train_jax.core.moved_modules import install

install(
    "flow_jax",
    """
assignment                         couplings.assignment
conversions                        paths.conversions
digit_scores                       data.digit_scores
digits                             data.digits
evaluation                         tasks.plane_evaluation
flow_task                          tasks.flow_task
frechet                            metrics.frechet
guidance                           ode.guidance
image_data                         data.pictures
image_evaluation                   tasks.image_evaluation
image_files                        data.picture_files
image_flow_task                    tasks.image_flow_task
image_pairs                        data.picture_pairs
image_pictures                     tasks.image_pictures
image_sampling                     tasks.image_sampling
image_sets                         data.picture_sets
image_task                         tasks.images
integrate                          ode.integrate
large_couplings                    couplings.large
likelihood                         ode.likelihood
marginals                          paths.marginals
moments                            metrics.moments
pairs                              data.plane_pairs
path_choice                        tasks.path_choice
pictures                           tasks.plane_pictures
row_draws                          data.row_draws
sampling                           ode.sampling
sde                                ode.sde
shapes                             data.synthetic_pictures
sinkhorn                           couplings.entropic
task                               tasks.plane
toys                               data.toys
""",
)
