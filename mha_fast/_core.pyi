"""The extension: private, used by the modules beside it and by the tests."""

from types import NotImplementedType
from typing import Any

import numpy as np
from numpy.typing import NDArray

COMPILER: str
FARTHEST: int

class Question:
    q: Any
    k: Any
    v: Any
    mask: Any
    bias: Any
    causal: Any
    q_offset: Any
    window: Any
    kv_lengths: Any
    scale: Any
    softcap: Any
    sinks: Any
    alibi_slopes: Any
    dropout_p: Any
    seed: Any
    plain: bool
    def plan(self, threads: int | None = None) -> dict[str, Any]: ...
    def effective_scale(self) -> float: ...
    def scores(self, threads: int | None = None) -> NDArray[Any]: ...
    def measure(self, top: int, threads: int | None = None) -> tuple[NDArray[Any], ...]: ...
    def attend(
        self,
        out: Any = None,
        return_lse: Any = False,
        return_weights: Any = False,
        threads: Any = None,
        heads_of: NDArray[np.int64] | None = None,
        rows_of: NDArray[np.int64] | None = None,
    ) -> (
        NDArray[Any]
        | tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]
        | NotImplementedType
    ): ...

def ask(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    *,
    bias: Any = None,
    causal: Any = False,
    q_offset: Any = None,
    window: Any = None,
    kv_lengths: Any = None,
    scale: Any = None,
    softcap: Any = None,
    sinks: Any = None,
    alibi_slopes: Any = None,
    dropout_p: Any = 0.0,
    seed: Any = None,
) -> Question: ...
def attend_from(
    question: Question,
    total: tuple[NDArray[Any], NDArray[Any]] | None,
    run: tuple[NDArray[Any], NDArray[Any]] | None,
    complete: bool,
    threads: int | None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
def attend_together(
    questions: list[Question],
    outs: list[NDArray[Any]],
    return_lse: bool,
    threads: int | None,
) -> list[NDArray[Any]] | None: ...
def attend_for_gradients(
    question: Question, threads: int | None
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]: ...
def pull_back_through(
    question: Question,
    forward: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    d_out: NDArray[Any],
    d_lse: NDArray[Any] | None,
    scale: float,
    wanted: dict[str, Any],
    threads: int | None,
) -> dict[str, NDArray[Any]]: ...
def overlaps_itself(array: NDArray[Any]) -> bool: ...
def overlap(a: NDArray[Any], b: NDArray[Any] | None) -> bool: ...

PANEL: int

def linear_packed(
    x: NDArray[Any],
    panels: NDArray[Any],
    outputs: int,
    bias: NDArray[Any] | None,
    threads: int | None,
) -> NDArray[Any]: ...
def linear(
    x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, threads: int | None
) -> NDArray[Any]: ...
def rotate(
    x: NDArray[Any],
    out: NDArray[Any],
    cos: NDArray[Any],
    sin: NDArray[Any],
    positions: NDArray[np.int64],
    interleaved: bool,
    threads: int | None,
) -> None: ...
def norm_rows(
    x: NDArray[Any],
    residual: NDArray[Any] | None,
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    eps: float,
    centred: bool,
    threads: int | None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]: ...
def pull_back_norm(
    x: NDArray[Any],
    weight: NDArray[Any],
    stats: NDArray[Any],
    d_out: NDArray[Any],
    threads: int | None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]: ...
def get_threads() -> int: ...
def get_threads_set() -> int: ...
def set_threads(count: int) -> None: ...
def set_quota(count: int) -> None: ...
def after_fork_in_child() -> None: ...
def claim_threads(threads: int) -> int: ...
def is_forked() -> bool: ...
def isa_names(usable: bool = True) -> list[str]: ...
def get_isa() -> str: ...
def use_isa(name: str | None) -> None: ...
def geometry() -> dict[str, Any]: ...
def openmp_version() -> int: ...
def exp2(x: NDArray[Any]) -> NDArray[Any]: ...
def tanh(z: NDArray[Any]) -> NDArray[Any]: ...
def threefry(counter: list[int], key: list[int]) -> list[int]: ...
def fma_chain(rounds: int) -> float: ...
def read_all(x: NDArray[np.float32]) -> None: ...
def register_onnxruntime(options: Any, operators: tuple[Any, ...], threads: int) -> None: ...
