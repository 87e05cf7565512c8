"""The files in examples/serving agree with the server and with each other."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

from layerskip.serving.observability.metrics import PREFIX, ServerMetrics  # noqa: E402 - after a test for yaml

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "serving"
METRIC = re.compile(rf"{PREFIX}\w+")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FILES / "grafana.json").read_text())
    return found


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Names of all series of a server that has done something."""
    pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    metrics = ServerMetrics("m")
    metrics.observe_round("early_exit", 4, 2)
    body, _ = metrics.render()
    return {sample.name for family in text_string_to_metric_families(body.decode()) for sample in family.samples}


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_asks_for_series_that_servers_export(dashboard: dict[str, Any], exported: set[str]) -> None:
    variables = [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    asked = {name for text in queries(dashboard) + variables for name in METRIC.findall(text)}
    assert asked <= exported
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in exported if name.startswith(PREFIX)}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in asked} == families  # and leaves none out


def test_every_panel_has_a_place_and_a_datasource_of_its_own_choice(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"]
    kinds = {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]}
    assert kinds["datasource"] == "datasource"


def test_queries_are_balanced_and_filter_by_the_variables(dashboard: dict[str, Any]) -> None:
    for query in queries(dashboard):
        for opening, closing in ("()", "{}", "[]"):
            assert query.count(opening) == query.count(closing), query
        assert query.count('model_name=~"$model_name"') == len(METRIC.findall(query)), query
        if "histogram_quantile" in query:
            assert "sum by (le)" in query
            assert "_bucket{" in query


def test_prometheus_reads_metrics_with_the_key() -> None:
    configuration = yaml.safe_load((FILES / "prometheus.yml").read_text())
    (job,) = configuration["scrape_configs"]
    assert job.get("metrics_path", "/metrics") == "/metrics"
    assert job["authorization"]["credentials_file"]
    assert job["static_configs"][0]["targets"]


def documents(name: str) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all((FILES / name).read_text())}


def flag(arguments: list[str], name: str) -> float:
    (value,) = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{name}=")]
    return float(value)


def test_a_pod_has_time_to_drain() -> None:
    pod = documents("kubernetes.yaml")["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = flag(container["args"], "--drain-timeout")
    assert pod["terminationGracePeriodSeconds"] > sleep + drain
    liveness = container["livenessProbe"]  # /health is 503 while a server drains
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > sleep + drain


def test_ports_probes_and_labels_agree() -> None:
    found = documents("kubernetes.yaml")
    deployment, service, budget = (found[kind] for kind in ("Deployment", "Service", "PodDisruptionBudget"))
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    (port,) = container["ports"]
    entrypoint = instruction("ENTRYPOINT")
    assert port["containerPort"] == int(entrypoint[entrypoint.index("--port") + 1])
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    labels = template["metadata"]["labels"].items()
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        budget["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    assert deployment["spec"]["replicas"] >= 2
    scaler = documents("kubernetes_autoscaling.yaml")["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaler["minReplicas"] == deployment["spec"]["replicas"]


def test_a_pod_may_write_where_the_image_does_and_nowhere_else() -> None:
    pod = documents("kubernetes.yaml")["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == words("USER")[0]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for path in (*words("VOLUME"), "/tmp"):
        assert "emptyDir" in volumes[mounts[path]["name"]]
    entrypoint = instruction("ENTRYPOINT")
    key = mounts[entrypoint[entrypoint.index("--api-key-file") + 1]]
    assert key["readOnly"] is True
    assert "secret" in volumes[key["name"]]


def instruction(name: str) -> list[str]:
    """The words of an instruction of the Dockerfile in JSON form; of several the last."""
    found = re.findall(rf"^{name} (\[.*\])$", (FILES / "Dockerfile").read_text(), re.MULTILINE)
    words: list[str] = json.loads(found[-1])
    return words


def words(name: str) -> list[str]:
    """The words of an instruction of the Dockerfile; of several the last."""
    text = (FILES / "Dockerfile").read_text().replace("\\\n", " ")
    return shlex.split(re.findall(rf"^{name} (.*)$", text, re.MULTILINE)[-1])


def test_the_command_understands_what_the_image_and_the_pod_tell_it() -> None:
    """The Dockerfile's and the pod's arguments are read by the command itself, and make a valid configuration."""
    from layerskip.cli.flags.arguments import parse
    from layerskip.cli.serve import ServeArguments, server_config

    command, subcommand, *fixed = instruction("ENTRYPOINT")
    assert (command, subcommand) == ("layerskip", "serve")
    (container,) = documents("kubernetes.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"]
    for given in (instruction("CMD"), container["args"]):
        arguments = parse(ServeArguments, "serve", [*fixed, *given])
        config = server_config(arguments)
        assert (config.host, str(config.port)) == ("0.0.0.0", *words("EXPOSE"))
        assert config.api_key_file == Path("/run/secrets/layerskip-key")
    assert arguments.model.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config.drain_timeout == flag(container["args"], "--drain-timeout")
    assert words("STOPSIGNAL") == ["SIGTERM"]


def test_only_the_first_stage_has_a_compiler() -> None:
    build, runtime = re.split(r"^FROM .*$", (FILES / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    assert "g++" in build
    assert not re.search(r"apt-get|g\+\+|pip install|COPY (?!--from=build)", runtime)


def test_what_the_image_is_built_of_is_not_ignored() -> None:
    lines = (FILES / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    build = (FILES / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (?!--from)(.*)$", build, re.MULTILINE) for name in line.split()[:-1]]
    assert set(copied) == kept
    assert all((ROOT / name).exists() for name in copied)
