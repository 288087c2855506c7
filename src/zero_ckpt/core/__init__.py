"""The shared sharded-checkpoint core: tensors, files and ranks; no framework.

Data flows straight through: `state -> planner -> engine (shard_file -> storage) -> commit` on save and
`tags -> manifest -> planner -> reader -> state` on load.
"""
