//! Pods of the tests: the usual one, and one that writes.

use anyhow::{Result, ensure};
use xtask::demo_image;
use xtask::lab::Node;
use xtask::process::poll_until;

use super::{POD, POD_IPV4, POD_IPV6, SOON, TestLab};

/// A pod of 256 MiB with an echo, and a container that counts aloud.
pub fn pod_yaml(name: &str, ipv4: &str, ipv6: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {name}
  annotations:
    migrator/ipv4: {ipv4}/24
    migrator/ipv6: {ipv6}/64
    migrator/vm-memory: 256Mi
spec:
  containers:
    - name: echo
      image: {image}
      command: [/usr/local/bin/udp-echo]
    - name: counter
      image: {image}
      command: [/bin/sh, -c]
      args: ['i=0; while :; do i=$((i+1)); echo tick $i; usleep 50000; done']
",
        image = demo_image::REFERENCE
    )
}

/// The usual pod, and a container `writer` that says each number once it is in `/data/log`, synced. `/data` is the volume `claim`; its
/// own files are on a disk, too.
pub fn writer_yaml(claim: &str) -> String {
    let writer = format!(
        "    - name: writer
      image: {image}
      command: [/bin/sh, -c]
      args: ['i=0; while :; do i=$((i+1)); echo $i >> /data/log; dd if=/dev/urandom of=/data/blob bs=64k count=1 seek=$((i % 200)) conv=notrunc 2>/dev/null; sync; echo $i > /own; echo $i; done']
      resources:
        limits:
          ephemeral-storage: 64Mi
      volumeMounts:
        - name: data
          mountPath: /data
  volumes:
    - name: data
      persistentVolumeClaim:
        claimName: {claim}
",
        image = demo_image::REFERENCE
    );
    pod_yaml(POD, POD_IPV4, POD_IPV6) + &writer
}

/// The writer's file has every number up to `least`, and none is missing, doubled or out of turn.
///
/// # Errors
/// It is not so.
pub fn is_whole(file: &str, least: u64) -> Result<()> {
    let mut last = 0;
    // The last line may be under way.
    for line in file
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
    {
        ensure!(
            line.trim() == (last + 1).to_string(),
            "{line:?} after {last}"
        );
        last += 1;
    }
    ensure!(last >= least, "the file ends with {last}, {least} was said");
    Ok(())
}

impl TestLab {
    /// Waits until the writer has said more than `floor`; the last number.
    ///
    /// # Errors
    /// It does not.
    pub fn said(&self, node: Node, floor: u64) -> Result<u64> {
        let mut last = 0;
        poll_until(SOON, || {
            let log = self.succeeds(node, &["logs", POD, "writer"]);
            let log = log.unwrap_or_default();
            last = log.lines().last().and_then(|n| n.parse().ok()).unwrap_or(0);
            last > floor
        });
        ensure!(last > floor, "the writer is at {last}");
        Ok(last)
    }

    /// The writer's file, as its pod reads it, is [whole](is_whole).
    ///
    /// # Errors
    /// It is not, or the pod does not answer.
    pub fn file_is_whole(&self, node: Node, least: u64) -> Result<()> {
        let cat = ["exec", POD, "-c", "writer", "--", "/bin/cat", "/data/log"];
        is_whole(&self.succeeds(node, &cat)?, least)
    }
}
