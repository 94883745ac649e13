//! What the guest's agent keeps up goes on wherever the pod is, and is shown there.

use anyhow::{Context, Result, ensure};
use migrator::api::types::{ContainerStatus, PodDetail};
use migrator_tests::lab::{POD, SOON, TestLab};
use xtask::demo_image;
use xtask::lab::Node;
use xtask::process::poll_until;

fn yaml() -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {POD}
  annotations: {{ migrator/ipv4: 10.77.0.10/24, migrator/vm-memory: 256Mi }}
spec:
  hostname: named
  terminationGracePeriodSeconds: 1
  containers:
    - name: web
      image: {image}
      command: [/bin/sh, -c, 'touch /tmp/ok; while :; do sleep 1; done']
      securityContext: {{ runAsUser: 65534, runAsGroup: 65534 }}
      readinessProbe: {{ exec: {{ command: [test, -e, /tmp/ok] }}, periodSeconds: 1 }}
    - name: crash
      image: {image}
      command: [/bin/sh, -c, 'exit 4']
",
        image = demo_image::REFERENCE
    )
}

/// Waits until a container is shown as wanted.
fn shown(
    test: &TestLab,
    node: Node,
    name: &str,
    wanted: impl Fn(&ContainerStatus) -> bool,
) -> Result<ContainerStatus> {
    let mut last = None;
    let found = poll_until(SOON, || {
        let pod: Result<PodDetail> = test.get(node, &format!("/v1/pods/{POD}"));
        let all = pod.map(|pod| pod.summary.containers).unwrap_or_default();
        last = all.into_iter().find(|c| c.name == name);
        last.as_ref().is_some_and(&wanted)
    });
    ensure!(found, "node {} shows {last:?}", node.name());
    last.context("no such container")
}

#[test]
fn restarts_and_probes_go_on_where_the_pod_has_moved() -> Result<()> {
    let test = TestLab::up()?;
    test.import_demo(Node::A)?;
    test.run(Node::A, &yaml(), &[])?;
    let exec = |node, words: &[&str]| {
        test.succeeds(node, &[&["exec", POD, "-c", "web", "--"], words].concat())
    };
    let ready = |node, ready: bool| {
        shown(&test, node, "web", |c| c.condition.ready == Some(ready)).map(drop)
    };
    ready(Node::A, true)?;
    let who = exec(Node::A, &["/bin/sh", "-c", "id -u; id -g; hostname"])?;
    ensure!(who == "65534\n65534\nnamed\n", "{who}");
    let crash = shown(&test, Node::A, "crash", |c| c.condition.restarts > 0)?;
    ensure!(
        crash.condition.reason.as_deref() == Some("Error") && crash.condition.last_code == Some(4),
        "{crash:?}"
    );
    exec(Node::A, &["/bin/rm", "/tmp/ok"])?;
    ready(Node::A, false)?;
    test.moves(Node::A)?;
    // The probe and the wait are the guest's: they came along.
    ready(Node::B, false)?;
    exec(Node::B, &["/bin/touch", "/tmp/ok"])?;
    ready(Node::B, true)?;
    let restarts = crash.condition.restarts;
    shown(&test, Node::B, "crash", |c| c.condition.restarts > restarts)?;
    test.restart(Node::B, || Ok(()))?;
    shown(&test, Node::B, "crash", |c| c.condition.restarts > restarts)?;
    ready(Node::B, true)?;
    let text = test.succeeds(Node::B, &["inspect", POD])?;
    ensure!(text.contains("last end: Error (4)"), "{text}");
    test.succeeds(Node::B, &["stop", POD])?;
    test.end()
}
