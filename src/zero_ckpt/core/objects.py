"""Python state <-> typed JSON and tensors. Opening it runs no code.

JSON's own values stand for themselves: None, bool, int, finite float, str, list, and dict with string keys. Everything
else is an object with one `$` key that names its type:

    $tuple $set $frozenset $slice $range  [items]    $dict $odict $counter  [[key, value], ...]
    $defaultdict             [factory, [[k, v]...]]  $float $complex    "nan", "inf"; ["1.0", "nan"]
    $int                     "0x..." beyond 64 bits  $bytes $bytearray  base64
    $tensor                  entry name              $parameter         [entry name, requires_grad]
    $array                   entry name              $ndarray           [numpy dtype, shape, base64]
    $scalar                  [numpy dtype, base64]   $dtensor           name of a tensor that all ranks hold in part
    $dtype $device           name                    $size              [numbers]
    $path $datetime $date    text                    $timedelta         [days, seconds, microseconds]
    $pickle                  [entry name, type]: anything else

A pickled value is opened only when the caller says `weights_only=False`; the error names its path and type. Entries are
named tensors that lie beside the JSON in the same shard file; `$ndarray` is for the types that torch lacks.
"""

from __future__ import annotations

from zero_ckpt.core.decoding import Shown, decode_objects, show_objects
from zero_ckpt.core.encoding import EncodedObjects, encode_objects

__all__ = [
    "OBJECTS",
    "RANK_OBJECTS",
    "EncodedObjects",
    "Shown",
    "decode_objects",
    "encode_objects",
    "show_objects",
]

OBJECTS, RANK_OBJECTS = "objects", "rank_objects"
"""Names of the two trees in a state file; `<name>.json` is the entry that holds the tree itself."""
