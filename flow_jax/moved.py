"""Old import paths of flow_jax, from before its modules were grouped in subpackages; they still work.

Importing one gives a DeprecationWarning. They will be removed in the release after next.
"""

from train_jax.core.moved_modules import install

install(
    "flow_jax",
    """
assignment                         couplings.assignment
conversions                        paths.conversions
data.picture_files                 data.image_decoding
data.picture_pairs                 data.image_pairs
data.picture_sets                  data.image_sets
data.pictures                      data.image_datasets
data.synthetic_pictures            data.synthetic_images
digit_scores                       data.digit_scores
digits                             data.digits
evaluation                         tasks.plane_evaluation
flow_task                          tasks.flow_task
frechet                            metrics.frechet
guidance                           ode.guidance
image_data                         data.image_datasets
image_evaluation                   tasks.image_evaluation
image_files                        data.image_decoding
image_flow_task                    tasks.image_flow_task
image_pairs                        data.image_pairs
image_pictures                     tasks.image_figures
image_sampling                     tasks.image_sampler
image_sets                         data.image_sets
image_task                         tasks.images
integrate                          ode.integrate
large_couplings                    couplings.large
likelihood                         ode.likelihood
marginals                          paths.marginals
models.features                    models.layers
moments                            metrics.moments
pairs                              data.plane_pairs
path_choice                        tasks.path_choice
pictures                           tasks.plane_figures
row_draws                          data.row_draws
sampling                           ode.sampling
sde                                ode.sde
shapes                             data.synthetic_images
sinkhorn                           couplings.entropic
task                               tasks.plane
tasks.image_pictures               tasks.image_figures
tasks.image_sampling               tasks.image_sampler
tasks.plane_pictures               tasks.plane_figures
toys                               data.toys
""",
    """
data.image_sets        ArrayPictures    ArrayImages
data.image_sets        FolderPictures   FolderImages
data.image_sets        Picture          LabeledImage
data.image_sets        Pictures         ImageSet
data.image_sets        Subset           ImageSubset
data.image_sets        TfdsPictures     TfdsImages
data.synthetic_images  ShapePictures    ShapeImages
tasks.image_sampler    Sampler          ImageSampler
tasks.image_evaluation Evaluation       ImageEvaluation
""",
)
