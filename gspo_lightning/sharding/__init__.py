"""A policy of which every rank holds a part: what is cut, and when it is whole."""

from gspo_lightning.policy.shards import whole_tensor
from gspo_lightning.sharding.cut import whole_state
from gspo_lightning.sharding.ranks import Sharded, cuts, mesh_of, share_out, weights_of
from gspo_lightning.sharding.strategy import FSDP2
from gspo_lightning.sharding.whole import Whole
