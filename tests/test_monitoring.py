"""monitoring/: its alerts and its dashboard, in a real Prometheus that reads a running relay."""

import json
import os
import re
import signal
import subprocess

import httpx
import pytest
import yaml
from programs import program
from relay import ROOT, watched
from servers import PATIENCE, RedisServer, free_port, until

from tornado_relay.counts import GAUGES, METRICS

FOLDER = ROOT / "monitoring"
RULES = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]

# What a relay with two workers shows in which nothing is wrong, one sample a minute, and for each alert what is wrong.
HEALTHY = {
    'up{job="sse-relay"': "1x60",
    'sse_relay_worker_up{worker="0"': "1x60",
    'sse_relay_worker_up{worker="1"': "1x60",
    'sse_relay_broker_up{worker="0"': "1x60",
    'sse_relay_broker_up{worker="1"': "1x60",
    "sse_relay_broker_reconnects_total{": "2x60",
    'sse_relay_worker_restarts_total{reason="died"': "1x60",
    'sse_relay_streams{worker="0"': "700x60",
    'sse_relay_streams_capacity{worker="0"': "1000x60",
    "sse_relay_streams_limit{": "1000x60",
    'sse_relay_refusals_total{reason="full"': "5x60",
    'sse_relay_refusals_total{reason="authority"': "5x60",
    'sse_relay_delivery_latency_seconds_bucket{le="1.0"': "0+600x60",
    'sse_relay_delivery_latency_seconds_bucket{le="2.5"': "0+601x60",
    'sse_relay_delivery_latency_seconds_bucket{le="+Inf"': "0+601x60",
    'sse_relay_loop_lag_seconds_bucket{le="0.5"': "0+600x60",
    'sse_relay_loop_lag_seconds_bucket{le="1.0"': "0+601x60",
    'sse_relay_loop_lag_seconds_bucket{le="+Inf"': "0+601x60",
    'sse_relay_streams_closed_total{reason="client"': "0+90x60",
    'sse_relay_streams_closed_total{reason="cut"': "0+10x60",
    'sse_relay_resets_total{reason="history-lost"': "3x60",
    'sse_relay_resets_total{reason="unknown-id"': "0+9x60",
    "sse_relay_history_failures_total{": "4x60",
    'sse_relay_publishes_total{result="failed"': "4x60",
    'sse_relay_reloads_total{result="failed"': "1x60",
}
WRONG = {
    "RelayDown": {'up{job="sse-relay"': "1x20 0x40"},
    "RelayWorkerDown": {'sse_relay_worker_up{worker="1"': "1x20 0x40"},
    "RelayBrokerDown": {'sse_relay_broker_up{worker="1"': "1x20 0x40"},
    "RelayBrokerFlapping": {"sse_relay_broker_reconnects_total{": "0x20 0+1x40"},
    "RelayWorkersRestart": {'sse_relay_worker_restarts_total{reason="died"': "0x20 0+1x40"},
    "RelayNearlyFull": {'sse_relay_streams{worker="0"': "801x60"},
    "RelayRefusesForWantOfRoom": {'sse_relay_refusals_total{reason="full"': "0x28 1x32"},
    "RelayRefusesForTheApplication": {'sse_relay_refusals_total{reason="authority"': "0x20 0+1x40"},
    "RelayDeliversLate": {'sse_relay_delivery_latency_seconds_bucket{le="1.0"': "0+590x60"},
    "RelayLoopLags": {'sse_relay_loop_lag_seconds_bucket{le="0.5"': "0+590x60"},
    "RelayCutsReaders": {'sse_relay_streams_closed_total{reason="cut"': "0+30x60"},
    "RelayMissedEvents": {'sse_relay_resets_total{reason="history-lost"': "0x28 1x32"},
    "RelayHistoryFails": {"sse_relay_history_failures_total{": "0x20 0+1x40"},
    "RelayPublishingFails": {'sse_relay_publishes_total{result="failed"': "0x20 0+1x40"},
    "RelayReloadFailed": {'sse_relay_reloads_total{result="failed"': "0x28 1x32"},
}


def test_each_alert_has_its_case():
    """And each is said to be for at once or for the morning."""
    assert [rule["alert"] for rule in RULES] == list(WRONG)
    assert {rule["labels"]["severity"] for rule in RULES} == {"page", "ticket"}


@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_alert_fires_for_what_it_is_about(tmp_path, wrong):
    """After half an hour of it that one fires, and no other; where nothing is wrong none does."""
    series = HEALTHY | (WRONG[wrong] if wrong else {})
    queries = [
        {"expr": f'count(ALERTS{{alertname="{rule["alert"]}", alertstate="firing"}}) or vector(0)', "eval_time": "30m"}
        | {"exp_samples": [{"labels": "{}", "value": int(rule["alert"] == wrong)}]}
        for rule in RULES
    ]
    inputs = [
        {"series": f'{name}{"" if name.endswith("{") else ","}instance="relay"}}', "values": values}
        for name, values in series.items()
    ]
    suite = {
        "rule_files": [str(FOLDER / "alerts.yml")],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": inputs, "promql_expr_test": queries}],
    }
    (tmp_path / "suite.yml").write_text(yaml.safe_dump(suite))
    done = subprocess.run(
        [program("promtool"), "test", "rules", tmp_path / "suite.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """One that reads a relay each second, with our rules, which do not wait here before they fire."""

    def __init__(self, folder, target):
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        (scrape,) = config["scrape_configs"]
        (scrape["static_configs"][0]["targets"],) = [[target]]
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        rules = (FOLDER / "alerts.yml").read_text()
        (folder / "alerts.yml").write_text(re.sub(r"^ +for: .*\n", "", rules, flags=re.MULTILINE))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/api/v1"
        self.process = subprocess.Popen(
            [
                *(program("prometheus"), f"--config.file={folder}/prometheus.yml"),
                *(f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"),
            ],
            cwd=folder,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self):
        try:
            until(self._answers, "Prometheus answers")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(PATIENCE)

    def _answers(self):
        assert self.process.poll() is None
        try:
            return httpx.get(f"{self.url}/query", params={"query": "up"}).status_code == 200
        except httpx.ConnectError:
            return False

    def query(self, expression):
        answer = httpx.get(f"{self.url}/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        return answer["data"]["result"]

    def firing(self):
        alerts = httpx.get(f"{self.url}/alerts").json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def expressions():
    """Those of the dashboard, as Grafana would ask them for all relays."""
    for panel in json.loads((FOLDER / "grafana.json").read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"].replace("$instance", ".*").replace("$__rate_interval", "10s")


def test_dashboard_shows_what_there_is():
    """Each of its names is a metric's, and each metric is on it but for those that only make a part of one."""
    names = {f"sse_relay_{metric.name}{'_bucket' if metric.bounds else '_total'}" for metric in METRICS}
    names |= {f"sse_relay_{gauge.name}" for gauge in GAUGES}
    shown = {name for _, expression in expressions() for name in re.findall(r"sse_relay_\w+", expression)}
    assert shown <= names
    assert names - shown == {"sse_relay_connections_waiting", "sse_relay_channels", "sse_relay_replayed_bytes_total"}
    alerted = {name for rule in RULES for name in re.findall(r"sse_relay_\w+", rule["expr"])}
    assert alerted <= names | {"sse_relay_streams_limit"}


def test_alerts_and_dashboard_of_a_running_relay(home, tmp_path, channel, pages):
    """Every panel has data; the broker's end, workers that are killed, and the relay's end are each told, and pass."""
    folder = home / f"monitoring-{channel}"
    folder.mkdir()
    with (
        RedisServer(folder) as server,
        watched(tmp_path, workers=2, **server.environment) as relay,
        Prometheus(tmp_path, relay.url.removeprefix("http://")) as prometheus,
    ):
        pages.open(relay.relay.port, ["/channel=x"] * 10)
        until(lambda: prometheus.query("sse_relay_broker_probe_seconds"), "a probe, for which it must be quiet", 40)

        def empty():
            server.publish("x", "hello")  # or there is no latency
            return [title for title, expression in expressions() if not prometheus.query(expression)]

        until(lambda: not empty(), "data for every panel", 40)
        assert prometheus.firing() == set()
        server.stop()
        until(lambda: "RelayBrokerDown" in prometheus.firing(), "the broker is missed", 40)
        server.start()
        until(lambda: prometheus.firing() == {"RelayMissedEvents"}, "it is back, and pages were told", 40)
        for number in (1, 2, 3):
            os.kill(relay.relay.workers()[0], signal.SIGKILL)

            def replaced(number=number):
                told = relay.metrics()
                up = told["sse_relay_worker_up", "0"], told["sse_relay_worker_up", "1"]
                return told["sse_relay_worker_restarts_total", "died"] == number and up == (1, 1)

            until(replaced, "the next one serves")
        until(lambda: "RelayWorkersRestart" in prometheus.firing(), "that they end is told", 40)
        relay.relay.stop()
        until(lambda: "RelayDown" in prometheus.firing(), "the relay is missed", 40)
