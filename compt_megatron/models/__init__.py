"""CLIP towers and plain ViTs on megatron-core's transformer blocks.

`build_model(spec)` makes a model, `load_canonical` fills it, `canonical_state` reads it back under the table's names.
Importing this package imports megatron-core, which must happen here first (see `megatron_cpu`).
"""

from compt_megatron.models.megatron_cpu import install

install()
