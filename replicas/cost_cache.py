"""What a replica has learned of its costs, kept for the next start of the same kind: on disk, and in Redis.

A kind is all that costs depend on: model and numerics, threads, processor or GPU, and the code that runs a
step. What this machine's disk has of it goes before what the cluster's Redis has, which any replica of the
kind wrote. Where neither has anything that can be used, a replica starts from its sweep alone.
"""

import asyncio
import hashlib
import json
import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from policies.control.store import LoadStore, StoreUnavailable
from policies.cost import ForwardStats, ReplicaCosts
from replicas.calibration import NO_OVERHEAD, StepOverhead, forward_cost, merged, sweep
from replicas.config import ReplicaConfig
from replicas.engine.batch import Runner
from replicas.machine import processor
from replicas.yields_file import read_yields

logger = logging.getLogger(__name__)

FORMAT = 3
MAX_BYTES = 1 << 18
"""The size past which nothing is written or read: what is learned is bounded, so it would be a mistake."""
MAX_FILES = 32
"""The number of files kept; past it the oldest go."""
SAVE_S = 30.0
"""The period at which a running replica saves."""


@dataclass(frozen=True, slots=True)
class Learned:
    """The content of a file."""

    format: int
    sweep: tuple[ForwardStats, ...]
    """The least that each shape has taken, over all starts."""
    costs: ReplicaCosts
    """The last costs: of them the factors and yields are begun from."""


_LEARNED = TypeAdapter(Learned)

_NEUTRAL = {
    "served_model_name",
    "app",
    "policy",
    "policy_params",
    "log_format",
    "calibration_s",
    "max_waiting",
    "target_ttft_s",
    "target_tpot_s",
}
"""Settings on which the cost of a step does not depend."""


class CostCache:
    """One file of costs. No method raises: a cache that fails costs knowledge, never a start."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind
        self._path = folder / f"costs-{kind}.json"
        self._sweep: tuple[ForwardStats, ...] = ()
        self._has_failed = False

    @classmethod
    def of(cls, config: ReplicaConfig) -> "CostCache":
        """The cache of a replica of this configuration here."""
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(Path(base) / "triad", _fingerprint(config))

    def load(self, pooled: str | None = None) -> Learned | None:
        """Reads what was learned; None where there is nothing that can be used.

        pooled: what Redis has of this kind, for where the disk has nothing.
        """
        try:
            if self._path.is_file():
                if self._path.stat().st_size > MAX_BYTES:
                    raise ValueError(f"it has more than {MAX_BYTES} bytes")
                learned = _LEARNED.validate_json(self._path.read_bytes())
                if learned.format == FORMAT:
                    return learned
        except (OSError, ValueError, ValidationError) as error:
            logger.warning("%s can't be read; what was learned is measured anew: %s", self._path, error)
        return None if pooled is None else _parsed(pooled)

    def begin(
        self, sweep: tuple[ForwardStats, ...], pooled: str | None = None
    ) -> tuple[tuple[ForwardStats, ...], Learned | None]:
        """Returns a start's sweep with what earlier ones found faster, and what was learned since."""
        learned = self.load(pooled)
        self._sweep = sweep if learned is None else merged(learned.sweep, sweep)
        return self._sweep, learned

    def text(self, costs: ReplicaCosts) -> str:
        """Returns what was learned, as it is kept. Raises ValueError where it is too long for that."""
        text = _LEARNED.dump_json(Learned(FORMAT, self._sweep, costs))
        if len(text) > MAX_BYTES:
            raise ValueError(f"{len(text)} bytes are more than {MAX_BYTES}")
        return text.decode()

    def save(self, costs: ReplicaCosts) -> None:
        """Writes what was learned, in one move, so that no reader ever finds half of it."""
        try:
            text = self.text(costs).encode()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._path.parent, prefix=".costs-") as folder:
                written = Path(folder, self._path.name)
                written.write_bytes(text)
                os.replace(written, self._path)
            self._forget_oldest()
        except (OSError, ValueError) as error:
            if not self._has_failed:
                logger.warning("what was learned can't be kept in %s: %s", self._path, error)
            self._has_failed = True

    def _forget_oldest(self) -> None:
        files = sorted(self._path.parent.glob("costs-*.json"), key=lambda path: -path.stat().st_mtime)
        for path in files[MAX_FILES:]:
            path.unlink(missing_ok=True)


def _parsed(pooled: str) -> Learned | None:
    try:
        if len(pooled) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        learned = _LEARNED.validate_json(pooled)
    except (ValueError, ValidationError) as error:
        logger.warning("what the cluster has learned can't be read: %s", error)
        return None
    return learned if learned.format == FORMAT else None


def read_pooled(redis_url: str, app: str, kind: str) -> str | None:
    """Reads what replicas of a kind have learned from Redis, also while this thread's event loop runs; None
    where Redis has nothing or can't be reached, which is logged."""

    async def read() -> str | None:
        store = LoadStore(redis_url, app)
        try:
            return await store.read_learned(kind)
        except StoreUnavailable as error:
            logger.warning("a start without what the cluster has learned: %s", error)
            return None
        finally:
            await store.close()

    with ThreadPoolExecutor(1) as apart:
        return apart.submit(asyncio.run, read()).result()


def starting_costs(
    runner: Runner,
    config: ReplicaConfig,
    cache: CostCache,
    pooled: str | None = None,
    overhead: StepOverhead = NO_OVERHEAD,
) -> ReplicaCosts:
    """Measures what forwards cost here, and joins what is known of this checkpoint and was learned before.

    Yields are those of the checkpoint's own file, else those learned before; what these say of answers is
    left out, since it came from a file that is gone. So are yields of a sampler that is gone.
    pooled: what Redis has of this kind of replica.
    overhead: what steps take beside their forwards.
    """
    measured = sweep(
        runner,
        max_running=config.max_running,
        max_step_tokens=config.max_step_tokens,
        budget_s=config.calibration_s,
        overhead=overhead,
    )
    forwards, learned = cache.begin(measured, pooled)
    step = forward_cost(forwards, config.max_step_tokens)
    yields = read_yields(Path(config.checkpoint))
    if not yields and learned is not None:
        yields = tuple(replace(entry, differing=None, right=None) for entry in learned.costs.yields)
    if runner.spec.sampler is None:
        yields = tuple(entry for entry in yields if entry.plan.risk is None)
    if learned is None:
        return ReplicaCosts(step, yields)
    before = learned.costs
    return ReplicaCosts(step, yields, before.factors, rates=before.rates)


def _fingerprint(config: ReplicaConfig) -> str:
    """A hash of all that a step's cost depends on."""
    digest = hashlib.sha256(json.dumps([*_parts(config)]).encode())
    root = Path(__file__).parent
    sources = (path for folder in ("engine", "model", "kernels") for path in root.glob(f"{folder}/**/*"))
    for source in sorted(path for path in sources if path.suffix in (".py", ".cpp", ".h")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _parts(config: ReplicaConfig) -> tuple[object, ...]:
    return (FORMAT, config.model_dump(mode="json", exclude=_NEUTRAL), *processor())
