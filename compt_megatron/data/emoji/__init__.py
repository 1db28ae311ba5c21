"""The built-in data set `emoji`: the same emoji drawn by six artists, each with several captions (docs/emoji.md)."""

from compt_megatron.data.emoji.build import EmojiBuild, build_emoji
from compt_megatron.data.emoji.builtin import SPLITS, builtin_emoji_dir, emoji_facts, emoji_index, emoji_shards

__all__ = ["SPLITS", "EmojiBuild", "build_emoji", "builtin_emoji_dir", "emoji_facts", "emoji_index", "emoji_shards"]
