"""`python -m tests.scale.toy_encode SOURCE STORE [PAUSE]`: encode with the toy tokenizer, pausing after each batch."""

import sys
import time

import tests.toy  # noqa: F401  (registers the toy tokenizer)
import vistok
from vistok.data import store_writer
from vistok.data.sources import open_source
from vistok.scale.encode import EncodeOptions, encode_source

SPILL_SECONDS = 0.0  # every batch becomes a part, so that kills meet all kinds of files


def main() -> None:
    """Encode in batches of 4 with shards of 3 batches."""
    store_writer.SPILL_SECONDS = SPILL_SECONDS
    pause = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    encode_source(
        open_source(sys.argv[1]),
        vistok.create("toy"),
        sys.argv[2],
        EncodeOptions(batch_size=4, workers=2, shard_items=12),
        progress=lambda done, bad: (print(done, flush=True), time.sleep(pause)),
    )


if __name__ == "__main__":
    main()
