//! A pod that writes to disks, and a service that is killed meanwhile.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use migrator::api::types::PodDetail;
use migrator_tests::lab::{POD, SOON, TestLab};
use xtask::lab::Node;
use xtask::process::poll_until;
use xtask::{cmd, demo_image};

/// Writes numbered records to its volume, each with its checksum and durable before it is told.
const WRITER: &str = "cd /data; i=0; while :; do i=$((i+1)); \
    head -c 20000 /dev/urandom > r$i; sha256sum r$i > s$i; sync; echo wrote $i; done";

fn yaml() -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {POD}
  annotations: {{migrator/ipv4: 10.77.0.10/24, migrator/vm-memory: 256Mi}}
spec:
  restartPolicy: Never
  volumes:
    - name: data
      persistentVolumeClaim: {{claimName: records}}
    - name: scratch
      emptyDir: {{sizeLimit: 64Mi}}
  containers:
    - name: writer
      image: {image}
      command: [/bin/sh, -c, '{WRITER}']
      resources: {{limits: {{ephemeral-storage: 64Mi}}}}
      volumeMounts:
        - {{name: data, mountPath: /data}}
        - {{name: scratch, mountPath: /scratch}}
",
        image = demo_image::REFERENCE
    )
}

/// The last record that the pod has told of.
fn written(test: &TestLab) -> Result<u64> {
    let log = test.succeeds(Node::A, &["logs", POD])?;
    let mut told = log.lines().filter_map(|l| l.strip_prefix("wrote "));
    let last = told.next_back();
    Ok(last.map_or(Ok(0), str::parse)?)
}

/// Waits until it is so; an error is one at once.
fn until(what: &str, mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    let mut last = Ok(false);
    let came = poll_until(Duration::from_secs(90), || {
        last = so();
        !matches!(last, Ok(false))
    });
    match (came, last) {
        (_, Err(error)) => Err(error),
        (true, Ok(_)) => Ok(()),
        (false, Ok(_)) => bail!("never: {what}"),
    }
}

fn goes_on(test: &TestLab, from: u64) -> Result<u64> {
    until("it writes on", || Ok(written(test)? > from))?;
    written(test)
}

fn is_clean(file: &Path) -> Result<()> {
    let mut fsck = Command::new("/usr/sbin/e2fsck");
    let said = cmd::bounded(fsck.arg("-fn").arg(file), SOON)?;
    ensure!(said.code == Some(0), "{said:?}");
    Ok(())
}

#[test]
fn what_a_pod_has_made_durable_outlives_killed_services_and_the_pod() -> Result<()> {
    let test = TestLab::up()?;
    test.import_demo(Node::A)?;
    test.succeeds(Node::A, &["volume", "create", "records", "--size", "256Mi"])?;
    test.run(Node::A, &yaml(), &[])?;
    let mut count = goes_on(&test, 2)?;
    for _ in 0..2 {
        test.restart(Node::A, || Ok(()))?;
        count = goes_on(&test, count + 2)?;
    }
    let pod: PodDetail = test.get(Node::A, &format!("/v1/pods/{POD}"))?;
    let names: Vec<&str> = pod.disks.iter().map(|disk| disk.name.as_str()).collect();
    ensure!(names == ["root", "data", "scratch"], "{names:?}");
    // A file is given back when it is removed.
    let exec = |script: &str| test.succeeds(Node::A, &["exec", POD, "--", "/bin/sh", "-c", script]);
    let scratch = || -> Result<u64> {
        let pod: PodDetail = test.get(Node::A, &format!("/v1/pods/{POD}"))?;
        Ok(pod.disks.last().map_or(0, |disk| disk.allocated_bytes))
    };
    let empty = scratch()?;
    exec("head -c 20000000 /dev/zero | tr '\\0' x > /scratch/x; sync")?;
    ensure!(scratch()? >= empty + 19_000_000, "{} bytes", scratch()?);
    exec("rm /scratch/x; sync")?;
    until("the room is given back", || {
        Ok(scratch()? < empty + 5_000_000)
    })?;
    // No room beyond the limit, and nothing worse than that.
    let full = test.says(
        Node::A,
        &[
            "exec",
            POD,
            "--",
            "/bin/sh",
            "-c",
            "dd if=/dev/zero of=/big bs=64k count=1300; r=$?; rm /big; exit $r",
        ],
    )?;
    ensure!(
        full.code != Some(0) && full.err.contains("No space left"),
        "{full:?}"
    );
    // One pod at a time, and not to be taken from it.
    let said = test.says(Node::A, &["volume", "rm", "records"])?;
    ensure!(said.code == Some(4) && said.err.contains(POD), "{said:?}");
    let count = goes_on(&test, count)?;
    test.succeeds(Node::A, &["stop", POD])?;
    let file = test.state(Node::A).join("volumes/records.img");
    is_clean(&file)?;
    // Another pod finds every record.
    let check = format!(
        "cd /data; for i in $(seq 1 {count}); do sha256sum -c s$i > /dev/null || exit 1; done; echo all $i"
    );
    test.run(Node::A, &yaml().replace(WRITER, &check), &[])?;
    until("every record is there", || {
        let log = test.succeeds(Node::A, &["logs", POD])?;
        Ok(log.contains(&format!("all {count}")))
    })?;
    test.succeeds(Node::A, &["stop", POD])?;
    test.succeeds(Node::A, &["volume", "rm", "records"])?;
    test.end()
}
