"""Checks of what callers ask with: tokenizer, template, adapter, salt, and a probe."""

from collections.abc import Iterator

from kvindex_server.doctor.facts import NO_SALT, NOR_SALT, Facts, Finding, Probe, Status, passed


def tokenizer(facts: Facts) -> Iterator[Finding]:
    """Text can be asked about."""
    if facts.tokenizer is None:
        needed = facts.probe is not None and facts.probe.kind in ("prompt", "chat")
        yield Finding(
            Status.FAIL if needed else Status.WARN,
            "the model has no tokenizer: prompts and chats are refused, tokens and keys are answered",
            "Start the server with --tokenizer MODEL=DIR, or set text.tokenizer_dirs or the model's tokenize_url.",
        )
        return
    mode, reason, _ = facts.tokenizer
    if mode == "native":
        yield passed("native, and its self-test against the reference has passed")
    elif mode == "remote":
        yield passed(f"remote: {reason}")
    elif "self-test" in reason or "differ" in reason:
        yield Finding(Status.WARN, f"reference: {reason}", "Answers are right but slower; report the tokenizer.")
    else:
        yield passed(f"reference: {reason}")


def tokens_agree(facts: Facts) -> Iterator[Finding]:
    """The engine's tokens of the probe are those made here."""
    probe = facts.probe
    if probe is None or not probe.engine_tokens:
        yield Finding(
            Status.SKIP,
            "no tokens of the engine were given to compare with",
            "Give a probe text, and --engine URL or what its POST /tokenize makes of the probe: --engine-tokens FILE.",
        )
        return
    if probe.error:
        yield Finding(Status.FAIL, f"the probe cannot be tokenized: {probe.error}", "Mend what the message names.")
        return
    ours, theirs = probe.tokens, probe.engine_tokens
    if list(ours) == list(theirs):
        yield passed(f"all {len(ours)} tokens of the probe are equal")
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    remedy = "Give the server the engine's own tokenizer directory"
    remedy += " and chat template." if probe.kind == "chat" else "; a first difference at 0 is often the BOS token."
    yield Finding(
        Status.FAIL,
        f"the server makes {len(ours)} tokens of the probe, the engine {len(theirs)}; they differ from {at} on",
        remedy,
    )


def chat_template(facts: Facts) -> Iterator[Finding]:
    """A chat is rendered as the engine does."""
    if facts.tokenizer is None:
        yield Finding(Status.SKIP, "no tokenizer, so no chat template")
    elif facts.tokenizer[2]:
        yield _template_compared(facts.probe)
    else:
        needed = facts.probe is not None and facts.probe.kind == "chat"
        yield Finding(
            Status.FAIL if needed else Status.WARN,
            "the tokenizer has no chat template: chats are refused",
            "Put the engine's chat_template.jinja into the tokenizer directory, or send prompts or tokens.",
        )


def _template_compared(probe: Probe | None) -> Finding:
    """A template is there: a chat that the engine has tokenized, too, tells whether it is the engine's."""
    if probe is None or probe.kind != "chat" or not probe.engine_tokens or probe.error:
        return Finding(
            Status.SKIP,
            "present; whether it equals the engine's only a chat and the engine's tokens of it can tell",
            "Give both: --chat FILE, and --engine URL or what its POST /tokenize makes of it: --engine-tokens FILE.",
        )
    if list(probe.tokens) == list(probe.engine_tokens):
        return passed("the chat becomes the engine's tokens, its template included")
    return Finding(
        Status.FAIL,
        "the chat does not become the engine's tokens, so its template differs, or the tokenizer",
        "Compare a plain prompt the same way: if that agrees, give the server the engine's chat_template.jinja, and "
        "the engine's /tokenize the request's tools, chat_template_kwargs and add_generation_prompt.",
    )


def lora(facts: Facts) -> Iterator[Finding]:
    """The adapter of the probe is known, and no other one would have been found."""
    probe = facts.probe
    if probe is None:
        known = ", ".join(facts.loras[:16]) or "none"
        yield Finding(
            Status.SKIP, f"no probe; adapters known by name: {known}", "Give a probe: --prompt, --chat, --tokens."
        )
        return
    best = max(probe.blocks.values(), default=0)
    others = probe.other_contexts
    for name, blocks in others.items():
        least, adapter = best, name.removesuffix(NOR_SALT)
        if adapter != name:  # told only where it holds more than either difference by itself
            least = max(best, others.get(adapter, 0), others.get(NO_SALT, 0))
        if name != NO_SALT and blocks > least:
            yield Finding(
                Status.FAIL,
                f"{blocks} blocks of the probe are held with {name}, {best} as it was asked",
                "Ask with the adapter that serves the request, its own name in lora_name or as the model"
                + (", and with the engine's cache_salt." if adapter != name else "."),
            )
    yield passed(f"no adapter known by name holds more of the probe than the {best} blocks found")


def salt(facts: Facts) -> Iterator[Finding]:
    """The salt of the probe is the one that its blocks were stored with."""
    probe = facts.probe
    if probe is None or not probe.salted:
        yield _unsalted(facts)
        return
    best, bare = max(probe.blocks.values(), default=0), probe.other_contexts.get(NO_SALT, 0)
    if bare > best:
        yield Finding(
            Status.FAIL,
            f"{bare} blocks of the probe are held without the salt, {best} with it",
            "Send the same cache_salt to the index as to the engine.",
        )
    elif not best:
        yield Finding(Status.SKIP, "no block of the probe is held, with the salt or without it: it cannot be told")
    yield passed(f"the salt is not in the way: {best} blocks with it, {bare} without")


def _unsalted(facts: Facts) -> Finding:
    """Salts that engines used are not kept; that they used some is, and a prompt that nobody holds may lack one."""
    beginnings, salted = (sum(each.beginnings[at] for each in facts.dialects) for at in (0, 1))
    evidence = f"no salt was asked with; {salted} of {beginnings} prompts that engines began to store had one"
    missed = facts.probe is not None and facts.probe.total_blocks and not max(facts.probe.blocks.values(), default=0)
    if salted and missed:
        remedy = "Send the request's cache_salt to the index as it is sent to the engine, and give it to the probe."
        return Finding(Status.WARN, f"nothing of the probe is held, and {evidence}", remedy)
    return Finding(Status.SKIP, evidence)


def probe(facts: Facts) -> Iterator[Finding]:
    """What was found of the probe."""
    probe = facts.probe
    if probe is None:
        yield Finding(Status.SKIP, "no probe was given", "Give a prompt that a pod has just served.")
    elif probe.error:
        yield Finding(Status.FAIL, f"the probe cannot be looked up: {probe.error}", "Mend what the message names.")
    elif not probe.total_blocks:
        yield Finding(Status.FAIL, f"the probe's {len(probe.tokens)} tokens fill no block", "Give a longer prompt.")
    elif best := max(probe.blocks.values(), default=0):
        pod = next(pod for pod, blocks in probe.blocks.items() if blocks == best)
        yield passed(f"{best} of {probe.total_blocks} blocks are held by {pod}")
    else:
        yield Finding(
            Status.WARN,
            f"no pod holds the first of the probe's {probe.total_blocks} blocks",
            "When a pod has served it: compare tokens (tokens_agree), adapter and salt; `kvindex explain` shows more.",
        )
