"""The families of models that are covered: what works on each, and how that is checked."""

from __future__ import annotations

from dataclasses import dataclass

_TINY = "tiny random model"
_BUILT_IN = f"{_TINY}; the built-in model"


@dataclass(frozen=True)
class Family:
    """What works on the models of one Hugging Face `model_type`.

    Attributes
    ----------
    name
        What people call it.
    examples
        Names on the Hugging Face hub.
    edges
        Circuits of edges: ablated runs, attribution, ACDC, completeness.
    nodes
        The effect of ablating heads and MLPs.
    roles
        Head roles by what each head writes towards the answer.
    editing
        Editing an MLP's down-projection.
    checked
        What the tests hold against Hugging Face's own logits, the slow definition of a cut and the slow ACDC. Beside
        that, every model is checked when it is loaded (`kcwb.models.selfcheck`).
    note
        What a user has to know; empty if nothing.
    """

    name: str
    examples: tuple[str, ...]
    edges: bool = True
    nodes: bool = True
    roles: bool = True
    editing: bool = True
    checked: str = _TINY
    note: str = ""


_POST_NORM = (
    "a norm follows attention and MLP: a head's output is its share of the sum under the run's own scale, which all "
    "heads of a layer set together"
)
_ENCODER = "a norm follows each sum: no residual stream to cut edges of; masked-token tasks, whole nodes"

#: Hugging Face `model_type` -> the family. Everything else is refused.
FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT-2", ("gpt2", "gpt2-medium", "gpt2-large")),
    "llama": Family(
        "Llama (TinyLlama, SmolLM2)",
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "HuggingFaceTB/SmolLM2-360M"),
        checked=_BUILT_IN,
    ),
    "mistral": Family("Mistral", ("mistralai/Mistral-7B-v0.1",)),
    "qwen2": Family("Qwen2", ("Qwen/Qwen2.5-0.5B",)),
    "qwen3": Family("Qwen3", ("Qwen/Qwen3-0.6B",)),
    "gpt_neox": Family("GPT-NeoX (Pythia)", ("EleutherAI/pythia-160m", "EleutherAI/pythia-410m")),
    "gptj": Family("GPT-J", ("EleutherAI/gpt-j-6b",)),
    "gpt_neo": Family("GPT-Neo", ("EleutherAI/gpt-neo-125m", "EleutherAI/gpt-neo-1.3B")),
    "opt": Family("OPT", ("facebook/opt-125m", "facebook/opt-1.3b")),
    "phi": Family("Phi", ("microsoft/phi-1_5", "microsoft/phi-2")),
    "phi3": Family("Phi-3", ("microsoft/Phi-3-mini-4k-instruct",)),
    "gemma": Family("Gemma", ("google/gemma-2b",)),
    "gemma2": Family("Gemma 2", ("google/gemma-2-2b",), roles=False, editing=False, note=_POST_NORM),
    "gemma3_text": Family(
        "Gemma 3", ("google/gemma-3-270m", "google/gemma-3-1b-pt"), roles=False, editing=False, note=_POST_NORM
    ),
}


def _encoder(name: str, *examples: str) -> Family:
    return Family(name, examples, edges=False, roles=False, editing=False, note=_ENCODER)


#: Encoders: `kcwb.models.encoder.load_encoder`, not `load_model`.
ENCODERS: dict[str, Family] = {
    "bert": _encoder("BERT", "google-bert/bert-base-uncased", "google-bert/bert-large-uncased"),
    "roberta": _encoder("RoBERTa", "FacebookAI/roberta-base"),
}
