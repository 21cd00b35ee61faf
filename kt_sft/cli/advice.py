"""What a user can do about the facts that `kt-sft doctor` found: plain sentences, only those that apply."""

from __future__ import annotations

from typing import Any

_THP_FILE = "/sys/kernel/mm/transparent_hugepage/enabled"


def advise(facts: dict[str, Any]) -> list[str]:
    """The advice for a machine, most important first; empty where there is nothing to do.

    Args:
        facts: As `doctor.examine` gives them.
    """
    return [*_engine(facts), *_hosts(facts), *_cpus(facts), *_memory(facts), *_accelerator(facts)]


def _engine(facts: dict[str, Any]) -> list[str]:
    engine = facts["engine"]
    if engine["error"] is not None:
        return [f"The engine does not run: {engine['error']}"]
    sentences = []
    usable = [tier["name"] for tier in facts["tiers"] if tier["available"]]
    if engine["limit"] is not None and engine["tier"] != usable[-1]:
        sentences.append(
            f"KT_SFT_ISA={engine['limit']} holds the engine at {engine['tier']} although this machine has "
            f"{usable[-1]}: unset it unless you are comparing tiers."
        )
    if "amx_tile" in facts["cpu"]["matrix_flags"] and "amx" not in usable:
        sentences.append(
            "This CPU has AMX but the engine cannot use it: run a kernel of 5.16 or newer and a kt_sft with an AMX "
            "tier, and let the container's seccomp profile pass arch_prctl."
        )
    return sentences


def _hosts(facts: dict[str, Any]) -> list[str]:
    sentences = []
    for host in facts["hosts"]:
        if host["fits"]:
            continue
        state = "is not installed" if host["version"] is None else f"{host['version']} is installed"
        sentences.append(
            f"{host['name']} {state}, kt_sft needs {host['name']}{host['wanted']}: "
            f'pip install -c constraints.txt "{host["name"]}{host["wanted"]}".'
        )
    sentences += [
        f"{seam['problem']}: recipes with a kt_sft block may not run; install the versions in constraints.txt."
        for seam in facts["seams"]
        if seam["problem"] is not None
    ]
    return sentences


def _cpus(facts: dict[str, Any]) -> list[str]:
    cpu = facts["cpu"]
    sentences = []
    limit = cpu["container_limit"]
    if limit is not None and limit < cpu["usable"]:
        sentences.append(
            f"Your container grants {limit:g} of {cpu['usable']} CPUs, and the engine runs no more threads than that: "
            "grant it more (docker run --cpus, or cpu limits in Kubernetes) if experts are to run faster."
        )
    elif cpu["usable"] < cpu["online"]:
        sentences.append(
            f"This process may use {cpu['usable']} of {cpu['online']} CPUs (taskset, cpuset or a batch system set "
            "that): widen it if experts are to run faster."
        )
    if len(facts["numa"]) > 1 and limit is not None and limit < cpu["usable"]:
        sentences.append(
            f"This machine has {len(facts['numa'])} NUMA nodes and your container limits CPU time instead of naming "
            "CPUs, so threads cannot be kept near their memory: name the CPUs (docker run --cpuset-cpus)."
        )
    if cpu["openmp_wait_policy"] != "passive":
        sentences.append(
            "Set OMP_WAIT_POLICY=passive before you start a run: torch's OpenMP threads otherwise spin for "
            "milliseconds on the cores that the engine is about to use."
        )
    return sentences


def _memory(facts: dict[str, Any]) -> list[str]:
    pages, memory = facts["huge_pages"], facts["memory"]
    sentences = []
    if pages["transparent"] == "never":
        sentences.append(f"Transparent huge pages are off: as root, echo madvise > {_THP_FILE}.")
    elif pages["granted"] is False:
        sentences.append(
            "Transparent huge pages are on but memory that asked for them got none: it is fragmented or nearly full; "
            "as root, echo 1 > /proc/sys/vm/compact_memory, and start again."
        )
    limit = memory["container_limit_bytes"]
    if limit is not None and limit < memory["total_bytes"]:
        sentences.append(
            f"Your container may take {limit / 2**30:.0f} of the machine's {memory['total_bytes'] / 2**30:.0f} GiB: "
            "experts must fit in there."
        )
    return sentences


def _accelerator(facts: dict[str, Any]) -> list[str]:
    if facts["accelerators"]:
        return []
    return ["torch sees no accelerator: a recipe with bf16: true needs use_cpu: true as well."]
