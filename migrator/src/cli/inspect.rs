//! `migrator inspect POD`.

use std::process::ExitCode;

use clap::Args;
use vm_runtime::units::Bytes;

use super::failure::Failure;
use super::{Context, Output, output};
use crate::api::client::encode;
use crate::api::types::{ContainerState, ContainerStatus, PodDetail};

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// The pod
    pod: String,
}

impl InspectArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        let path = format!("/v1/pods/{}", encode(&self.pod));
        let pod: PodDetail = context.client.get(&path).await?;
        match context.output {
            Output::Json => output::json(&pod)?,
            Output::Text => output::bytes(describe(&pod).as_bytes())?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// A container's state in words.
fn fares(container: &ContainerStatus) -> String {
    let more = &container.condition;
    let mut text = match container.state {
        ContainerState::Waiting => "waiting".to_owned(),
        ContainerState::Running if more.ready == Some(false) => "running, not ready".to_owned(),
        ContainerState::Running => "running".to_owned(),
        ContainerState::Exited { code } => format!("exited with {code}"),
    };
    if more.restarts > 0 {
        text.push_str(&format!(", {} restarts", more.restarts));
    }
    if let Some(reason) = &more.reason {
        text.push_str(&format!(", last end: {reason}"));
        if let Some(code) = more.last_code {
            text.push_str(&format!(" ({code})"));
        }
    }
    text
}

fn describe(pod: &PodDetail) -> String {
    let s = &pod.summary;
    let none = || "-".to_owned();
    let mut rows = vec![
        ("Pod", s.name.clone()),
        ("Node", s.node.clone()),
        (
            "State",
            match &s.reason {
                Some(reason) => format!("{} ({reason})", s.state.as_str()),
                None => s.state.as_str().to_owned(),
            },
        ),
        ("Epoch", s.epoch.to_string()),
        ("Age", output::age(s.created_unix_ms)),
        ("Memory", Bytes(s.memory_bytes).to_string()),
        ("CPUs", s.vcpus.to_string()),
        ("MAC", s.mac.to_string()),
        (
            "IPv4",
            pod.spec
                .net
                .ipv4
                .map_or_else(none, |(a, p)| format!("{a}/{p}")),
        ),
        (
            "IPv6",
            pod.spec
                .net
                .ipv6
                .map_or_else(none, |(a, p)| format!("{a}/{p}")),
        ),
        (
            "Machine",
            format!("{} under {:?}", pod.vm.machine, pod.vm.accel),
        ),
        (
            "VMM",
            match (&pod.qemu, pod.vmm_pid) {
                (Some(qemu), Some(pid)) => format!("QEMU {}, process {pid}", qemu.version),
                (Some(_), None) | (None, _) => none(),
            },
        ),
        ("Slot", pod.slot.to_string()),
        ("Folder", pod.dir.display().to_string()),
    ];
    if let Some(id) = &s.migration {
        rows.push(("Migration", id.clone()));
    }
    let mut out: String = rows
        .into_iter()
        .map(|(key, value)| format!("{key:<11}{value}\n"))
        .collect();
    out.push_str("Containers\n");
    for container in &s.containers {
        out.push_str(&format!(
            "  {}  {}  {}\n",
            container.name,
            container.image,
            fares(container)
        ));
    }
    if !pod.disks.is_empty() {
        out.push_str("Disks\n");
    }
    for disk in &pod.disks {
        let volume = disk.volume.as_ref();
        out.push_str(&format!(
            "  {}  {}, {} of it allocated{}\n",
            disk.name,
            Bytes(disk.size_bytes),
            Bytes(disk.allocated_bytes),
            volume.map_or_else(String::new, |name| format!(", volume {name}"))
        ));
    }
    out
}
