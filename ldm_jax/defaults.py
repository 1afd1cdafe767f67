"""Every field of a configuration with its default and its meaning."""

from ml_collections import ConfigDict


def optimizer() -> ConfigDict:
    """AdamW or Adam. Learning rates are absolute: never multiplied by batch size or devices."""
    return ConfigDict(
        {
            "kind": "adamw",  # adamw | adam
            "learning_rate": 1e-4,  # peak
            "schedule": "constant",  # constant | cosine | linear | inverse_sqrt
            "warmup": 100,  # updates of linear warm-up
            "decay_start": 0.0,  # fraction of train.steps held at the peak before cosine or linear decay begins
            "final": 0.0,  # learning rate at the end of the decay, as a fraction of the peak
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "clip_norm": 1.0,  # global gradient norm; 0 clips nothing
        }
    )


def train() -> ConfigDict:
    return ConfigDict(
        {
            "steps": 100_000,  # optimiser updates
            "batch_size": 64,  # global
            "accumulation": 1,  # micro-batches an update
            "remat": "none",  # activations kept for the backward pass: none (recomputed) | blocks | full | conv+dense+attention, or some
            "dtype": "auto",  # auto (bfloat16 on accelerators, float32 on CPU) | bfloat16 | float32 | float64
            "max_nan": 10,  # updates skipped in a row for a loss that is not finite before the run stops
            "stall_after": 1800.0,  # seconds in which none of several processes begins an update, before the run ends with 1; 0: never
            "log_every": 50,
            "profile": (),  # first and last update of a profiler trace, (10, 15): WORKDIR/profile
            "init_from": "",  # a work or model directory whose weights the training starts from; gives a diffusion run its first stage too
        }
    )


def first_stage() -> ConfigDict:
    """The autoencoder: its network, its loss, and how it is trained when a run has to train it."""
    return ConfigDict(
        {
            "path": "",  # a work or model directory whose first stage is taken instead of training one
            "kind": "kl",  # kl | vq | identity (pixels are the latents; nothing is trained)
            "channels": 128,
            "channel_mult": (1, 2, 4, 4),
            "num_res_blocks": 2,
            "attention_levels": (),  # downsampling factors
            "mid_attention": True,
            "z_channels": 4,
            "latent_channels": 4,
            "patch_size": 1,
            "norm_groups": 0,  # of every norm; 0: 32, or fewer in narrow networks
            "quant_conv": True,  # 1x1 convolutions on both sides of the latents
            "init_log_var": 0.0,  # kl: log-variance of an untrained encoder's posterior
            "codebook": {  # vq
                "size": 8192,
                "beta": 0.25,  # weight of what holds the encoder to the codebook
                "legacy_beta": False,  # beta weighs what moves the codebook instead, as in the training of the released models
                "ema": 0.0,  # decay of the moving averages that the codebook follows in place of gradients; 0: gradients
            },
            # std (one number) | channel (mean and std of each) | a number such as 0.18215. A first stage that has a scale keeps it: there a
            # number must be that one.
            "latent_scale": "std",
            "statistics_examples": 10_000,  # of the training set, that the latent statistics are measured on; 0: all
            "loss": {
                "pixel": "l1",  # l1 | l2 | l1_l2
                "perceptual_weight": 1.0,
                "vgg": "",  # path of VGG16 weights; without them (or `linear`) the perceptual term is off
                "linear": "",  # path of the LPIPS linear heads
                "kl_weight": 1e-6,
                "codebook_weight": 1.0,
                "reduction": "sum",  # sum (over an image's values, as the paper's KL models) | mean (as its VQ models)
                "disc_weight": 0.5,
                "disc_start": 50_001,  # updates before the discriminator acts
                "disc_loss": "hinge",  # hinge | vanilla
            },
            "discriminator": {"features": 64, "num_layers": 3, "norm": "batch"},
            "train": train(),
            "optimizer": optimizer(),
            "ema": {"decays": (0.999,)},
        }
    )


def base() -> ConfigDict:
    """Every field of a diffusion run with its default."""
    return ConfigDict(
        {
            "seed": 0,
            "task": "diffusion",  # diffusion (and its first stage where needed) | autoencoder
            "data": {
                "source": "shapes",  # shapes | folder | tfds | array_record | tar | table (Hugging Face's parquet or arrow): docs/data.md
                "path": "",  # where the data lie; tfds: its data directory
                "name": "",  # tfds: dataset
                "split": "train",  # tfds, table
                "image_key": "image",  # tfds, table: the feature or column of each field, as far as it is read
                "text_key": "text",
                "label_key": "label",
                "boxes_key": "objects",
                "segmentation_key": "segmentation",
                "mask_key": "mask",
                "max_broken": 0.001,  # share of the pictures that may be broken, and replaced by the next good one; more stop the run
                "resolution": 64,  # pixels, square
                "buckets": (),  # heights and widths, ("64x64", "48x80"): pictures keep their shape as nearly as these have it
                "min_window": 0.0,  # pictures are random square windows of at least this share of the short side; 0: the central square
                "flip": False,  # random horizontal mirroring (captions that speak of left and right become wrong)
                "size": 40_000,  # shapes: scenes
                "seed": 1,  # shapes: which scenes
                "counts": (1, 2, 3),  # shapes: objects a scene, equally likely; repeat a number to weigh it
                "cache": True,  # encode once; False encodes in every step
                "latents": "",  # where the latent cache lies, to share it between runs; default: in the work directory
                "encode_batch": 128,  # pictures that a host encodes at a time
                "copies": "",  # where a machine copies latents that lie on gs:// to; default: ldm_jax/latents in the user's cache
                "workers": 2,  # reading threads
            },
            "first_stage": first_stage(),
            "denoiser": {
                "kind": "unet",  # unet | dit
                # of a unet
                "channels": 320,
                "channel_mult": (1, 2, 4, 4),
                "num_res_blocks": 2,
                "attention_levels": (1, 2, 4),  # downsampling factors
                "num_heads": 0,  # give this ...
                "head_channels": 64,  # ... or this, the other 0
                "transformer_depth": 1,
                "scale_shift": False,
                "resblock_updown": False,
                "places": False,  # fixed features of each place, so that a small network learns sooner to paint where it is told
                "vector_layers": 1,  # dense layers for conditions of the kind "vector": 0, 1 or 2
                "norm_groups": 0,  # of every norm; 0: 32, or fewer in narrow networks
                # of a dit
                "width": 384,
                "depth": 12,
                "patch_size": 2,  # of latents
                "learn_sigma": False,  # as many output channels again, for the variance, which is not used: what released weights have
                "cross_attention": False,
                "qk_norm": False,
                "legacy_frequencies": False,  # of the time embedding, as diffusers' class has them
                # of both
                "dropout": 0.0,
            },
            "conditioning": {
                "text": {
                    "enabled": True,
                    "kind": "transformer",  # transformer (the paper's, trained with the denoiser) | clip | t5
                    "frozen": False,  # its weights stay as they were given by train.init_from
                    "drop_rate": 0.1,  # share of captions replaced by the empty one in training, for guidance
                    "tokenizer": "train",  # train (on the captions) | path or name of a Hugging Face tokenizer
                    "vocab_size": 1024,  # at most, of a trained tokenizer
                    "max_length": 77,
                    "width": 512,
                    "depth": 6,
                    "num_heads": 8,
                    "head_dim": 64,  # transformer, t5
                    "activation": "quick_gelu",  # clip: quick_gelu | gelu
                    "skip_last": 0,  # clip: 1 takes the last layer but one
                    "ff_width": 2816,  # t5
                },
                "label": {
                    "enabled": False,
                    "num_classes": 1000,
                    "null_class": True,  # one more row of the table, for guidance
                    "width": 512,
                    "to": "crossattn",  # crossattn | vector (added to the time embedding)
                    "drop_rate": 0.1,
                },
                "boxes": {
                    "enabled": False,
                    "kind": "sequence",  # sequence (the paper's: three tokens a box, read by a transformer) | objects (an embedding a box)
                    "max_objects": 30,
                    "vocab_size": 8192,  # classes and places share the tokens
                    "width": 512,
                    "depth": 16,  # of a sequence, as are the heads
                    "num_heads": 8,
                    "head_dim": 64,
                    "drop_rate": 0.1,
                },
                "segmentation": {"enabled": False, "num_classes": 182, "stages": 2, "channels": 3, "drop_rate": 0.0},
                "low_res": {
                    "enabled": False,
                    "degradation": "bicubic",  # bicubic | bsr | bsr_light: how the small pictures are made
                    "drop_rate": 0.0,
                },
                "mask": {
                    "enabled": False,
                    "style": "ldm",  # ldm | sd (Stable Diffusion's order of channels)
                    "shrink": "any",  # any | nearest (as the released weights learnt it): what a latent is whose pixels differ
                    "holes": "medium",  # thin | medium | wide | boxes | half | outpaint: what is drawn where the data has no masks
                    "drop_rate": 0.0,
                },
                "neighbors": {
                    "enabled": False,
                    "count": 20,
                    "width": 768,
                    "database": "",  # .npy or .npz of embeddings to find neighbours in; "": those of the training pictures themselves
                    "queries": "",  # embeddings of the training pictures, in their order; "": their 8x8 mean colours (width 192)
                    "drop_rate": 0.1,
                },
            },
            "diffusion": {
                "process": "discrete",  # discrete | flow | cosine | sigma
                "schedule": "linear",  # discrete: linear (the paper's, in sqrt(beta)) | linear_beta | sqrt | cosine | given
                "start": 0.0,  # discrete: first and last beta, of schedules that have them; 0: the schedule's own
                "end": 0.0,
                "betas": (),  # discrete, given: num_steps of them
                "zero_terminal_snr": False,  # discrete: rescaled so that no signal is left at the last time
                "num_steps": 1000,
                "shift": 1.0,  # flow, cosine: resolution shift
                "sigma_min": 0.002,  # sigma: the noise levels, ...
                "sigma_max": 80.0,
                "rho": 7.0,  # ... even in sigma^(1/rho); 0: in log sigma (variance-exploding)
                "sigma_data": 1.0,  # sigma: standard deviation of the latents
                "prediction": "eps",  # eps | x0 | v | flow | edm
                "loss": "l2",  # l1 | l2 | huber
                "huber_delta": 1.0,
                "weighting": "none",  # none | min_snr | soft_min_snr | p2 | edm | sigmoid
                "gamma": 5.0,  # cap of min_snr and soft_min_snr, exponent of p2
                "weight_offset": 1.0,  # k of p2, b of sigmoid
                "vlb_weight": 0.0,  # discrete: weight of the variational bound besides (the paper's original_elbo_weight)
                "learn_log_variance": False,  # of the loss, one number a noise level: loss/exp(u) + u (the paper's learn_logvar)
                "offset_noise": 0.0,  # standard deviation of noise that a channel has in common
                "input_perturbation": 0.0,  # standard deviation of noise that the target does not have
                "time_sampling": "uniform",  # uniform | stratified | logit_normal | mode | log_normal | edm | edm2
                "time_mean": 0.0,  # of logit_normal, log_normal
                "time_std": 1.0,
                "mode_scale": 0.0,  # of mode
            },
            "optimizer": optimizer(),
            "ema": {"decays": (0.9999,)},  # the first is the default for sampling
            "train": train(),
            "sample": {
                "every": 5000,  # updates between preview grids
                "prompts": (),  # of the grid
                "sampler": "ddim",
                "steps": 50,
                "guidance": 3.0,
                "guidance_kind": "cfg",  # cfg | cfg++ | apg
                "guidance_interval": (),  # the levels of sigma/alpha with guidance, above the first and up to the second; (): all
                "guidance_rescale": 0.0,
                "guidance_parallel": 1.0,  # of apg
                "guidance_radius": 0.0,
                "guidance_momentum": 0.0,
                "eta": 0.0,
                "spacing": "trailing",
                "churn": 0.0,  # of heun: noise added on the way (EDM's S_churn), ...
                "churn_interval": (),  # ... at these levels of sigma/alpha; (): all
                "churn_noise": 1.0,  # its standard deviation
                "threshold": "none",  # none | static | dynamic: for pixels
                "threshold_max": 1.0,
                "threshold_quantile": 0.995,  # of dynamic
                "seed": 0,
                "batch_size": 50,
            },
            "evaluate": {
                "prompts": 500,  # fresh prompts for each number of objects, or scenes of other conditions, in the last table (shapes only)
                "held_out": 200,  # prompts with colour-shape pairs never seen
                "guidance": (1.0, 2.0, 3.0, 4.0, 6.0),  # tried on other prompts; the best is reported
                "guidance_prompts": 48,
                "every": 0,  # updates between evaluations while training (evaluations/*.json), each after a checkpoint; 0: none
                "examples": 256,  # held-out examples that losses are measured on
                "path": "",  # their data.path, ...
                "split": "",  # ... or data.split; drawn scenes need neither
                "samples": 64,  # drawn for each evaluation
                "inception": "",  # weights for the FID and MIND of these; "": LDM_INCEPTION, or mean colours alone
            },
            "checkpoint": {"every": 1000, "keep": 2},
            "mesh": {
                "slices": -1,  # of TPUs, joined by the data-centre network; -1: as many as the devices say
                "data": -1,  # copies of the parameters in a slice; -1: the remaining devices
                "fsdp": 1,  # devices that a copy is split over
                "rules": (),  # "REGEX=replicate" or "REGEX=fsdp" for leaves of the state, tried first
            },
        }
    ).lock()
