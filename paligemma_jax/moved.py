"""Old import paths of paligemma_jax, from before its modules were grouped in subpackages; they still work.

Importing one gives a DeprecationWarning. They will be removed in the release after next.
"""

from train_jax.core.moved_modules import install

install(
    "paligemma_jax",
    """
adapt.merge_quantized               adapt.lora.merge_quantized
adapt.bitfit                       adapt.peft.bitfit
adapt.blocks                       adapt.quantization.blocks
adapt.bottleneck                   adapt.peft.bottleneck
adapt.diff_pruning                 adapt.peft.diff_pruning
adapt.double_quantization          adapt.quantization.double_quantization
adapt.dynamic_map                  adapt.quantization.dynamic_map
adapt.family                       adapt.peft.methods
adapt.int4                         adapt.quantization.int4
adapt.int8                         adapt.quantization.int8
adapt.last_layers                  adapt.peft.last_layers
adapt.lora_spec                    adapt.lora.spec
adapt.nf4                          adapt.quantization.nf4
adapt.prefixes                     adapt.peft.prefixes
adapt.prompt_methods               adapt.few_shot.methods
adapt.prompts                      adapt.few_shot.learned_prompts
adapt.few_shot.prompts             adapt.few_shot.learned_prompts
adapt.quantize                     adapt.quantization.quantize
adapt.quantized_kernel             adapt.quantization.quantized_kernel
attribute_scores                   inference.attribute_scoring
beam                               generation.beam_search
box_scores                         metrics.boxes
candidates                         generation.candidate_scoring
classify                           inference.classify
consistency                        losses.coprompt
contrastive_gradients              losses.contrastive.backward
contrastive_losses                 losses.contrastive.api
contrastive_pairs                  losses.contrastive.pairs
contrastive_reference              losses.reference
contrastive_ring                   losses.contrastive.ring
contrastive_scores                 losses.contrastive.sigmoid_softmax
data.added_tokens                  data.tokenizers.added_tokens
data.augment                       images.augment
data.captioned                     data.sources.captioned
data.class_folders                 data.few_shot.class_folders
data.clevr                         data.sources.clevr
data.clevr_tree                    data.sources.clevr_tree
data.coop                          data.few_shot.coop
data.descriptions                  data.few_shot.descriptions
data.families                      data.sources.question_families
data.few_shot_rows                 data.few_shot.rows
data.image_processor               images.image_processor
data.images                        images.preprocessing
data.jsonl                         data.sources.jsonl
data.lru                           data.byte_lru
data.parquet                       data.sources.parquet
data.pieces                        data.tokenizers.pieces
data.pretraining_set               data.sources.pretraining_scenes
data.protocols                     data.few_shot.protocols
data.resize_tf                     images.tf_resize
data.scene_captions                data.sources.scene_captions
data.synthetic_classes             data.few_shot.synthetic_classes
data.text_tokens                   data.tokenizers.text_tower
data.tfds_captions                 data.sources.tfds_captions
data.tokenizer                     data.tokenizers.paligemma
few_shot_scores                    tasks.coprompt.scores
data.synthetic_clevr.descriptions  data.synthetic_clevr.conditioning
data.synthetic_clevr.render        data.synthetic_clevr.renderer
generate                           generation.generate
gradient_cache                     losses.gradient_cache
hub                                files.hub
inference.attributes               inference.attribute_scoring
models.dual_variants               models.variants
models.encoder                     models.encoder_block
models.low_rank                    adapt.lora.low_rank
predict                            inference.answer
prompt_inputs                      generation.inputs
sampling                           generation.token_sampling
shipped                            files.shipped
side_files                         files.side_files
tasks.contrastive_config           tasks.contrastive.config
tasks.contrastive_data             tasks.contrastive.data
tasks.contrastive_plan             tasks.contrastive.plan
tasks.contrastive_report           tasks.contrastive.report
tasks.coprompt_config              tasks.coprompt.config
tasks.coprompt_data                tasks.coprompt.data
tasks.coprompt_plan                tasks.coprompt.plan
tasks.coprompt_report              tasks.coprompt.report
tasks.detection                    tasks.pretraining.detection
tasks.features                     tasks.vqa.features
tasks.judge                        tasks.text_to_image.siglip_scorer
tasks.picture_sheet                tasks.image_sheet
tasks.scene_task                   tasks.pretraining.scene_task
tasks.shared_base                  tasks.process_cache
tasks.text_to_image.judge          tasks.text_to_image.siglip_scorer
tasks.vision_pretraining           tasks.pretraining.vision
tasks.vqa_adapter                  tasks.vqa.adapter_config
tasks.vqa.adapter                  tasks.vqa.adapter_config
tasks.vqa_answer                   tasks.vqa.answer_record
tasks.vqa.answer                   tasks.vqa.answer_record
tasks.vqa_config                   tasks.vqa.config
tasks.vqa_consistency              tasks.vqa.consistency
tasks.vqa_evaluation               tasks.vqa.evaluation
tasks.vqa_forgetting               tasks.vqa.forgetting
tasks.vqa_lengths                  tasks.vqa.rows
tasks.vqa.lengths                  tasks.vqa.rows
tasks.vqa_pictures                 tasks.vqa.figures
tasks.vqa_plan                     tasks.vqa.plan
tasks.vqa_report                   tasks.vqa.report
tasks.vqa_rows                     tasks.vqa.rows
tasks.vqa.base_cache               tasks.process_cache
tasks.vqa.pictures                 tasks.vqa.figures
token_chunks                       losses.token_chunks
token_divergence                   losses.chunked_kl
token_losses                       losses.chunked_cross_entropy
weights.adapter_folder             weights.adapters.method_folder
weights.big_vision_encoder         weights.big_vision.encoder
weights.config_keys                weights.hugging_face.transformers_keys
weights.hugging_face.config_keys   weights.hugging_face.transformers_keys
weights.config_values              weights.hugging_face.config_values
weights.digest                     weights.fingerprint
weights.dual_big_vision            weights.big_vision.dual_encoder
weights.dual_hugging_face          weights.hugging_face.dual_encoder
weights.dual_hugging_face_config   weights.hugging_face.dual_encoder_config
weights.folder                     weights.hugging_face.folder
weights.folder_write               weights.hugging_face.folder_write
weights.hugging_face_config        weights.hugging_face.paligemma_config
weights.hugging_face_names         weights.hugging_face.paligemma_names
weights.load                       weights.reader
weights.native                     weights.orbax.checkpoint
weights.native_config              weights.orbax.config
weights.npz                        weights.big_vision.npz
weights.peft                       weights.adapters.peft
weights.peft_config                weights.adapters.peft_config
weights.peft_describe              weights.adapters.peft_describe
weights.peft_names                 weights.adapters.peft_names
weights.processor                  weights.hugging_face.processor
weights.prompt_folder              weights.adapters.prompt_folder
weights.random_weights             weights.random_init
weights.tables                     weights.name_table
word_logits                        losses.vocab_projection
""",
    """
models.encoder_block               Attention   EncoderAttention
models.encoder_block               Block       EncoderBlock
models.encoder_block               Mlp         EncoderMlp
data.few_shot.descriptions         place       positions
generation.token_sampling          Sampler     TokenSampler
data.sources.captioned             encode_pictures  encode_scenes
losses.vocab_projection            logits_of   project
tasks.image_sheet                  save_sheet  save_image_sheet
tasks.text_to_image.siglip_scorer  Judge       SigLIPScorer
tasks.vqa.evaluation               Evaluation  VQAEvaluation
tasks.vqa.report                   Frequent    MajorityBaseline
tasks.vqa.rows                     Rows        RowProcessor
weights.adapters.peft              Adapter     PeftFolder
adapt.quantization.quantized_kernel  KINDS  QUANTIZATION_KINDS
data.few_shot.protocols            KINDS       PROTOCOL_KINDS
losses.coprompt                    KINDS       DISTANCES
""",
)
