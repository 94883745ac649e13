//! `migrator inspect POD`.

use std::process::ExitCode;

use clap::Args;
use vm_runtime::units::Bytes;

use super::failure::Failure;
use super::{Context, Output, output};
use crate::api::client::encode;
use crate::api::types::{ContainerState, ContainerStatus, ImageInfo, PodDetail};

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
    if !pod.images.is_empty() {
        out.push_str("Images\n");
    }
    for image in &pod.images {
        out.push_str(&describe_image(image));
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

fn describe_image(image: &ImageInfo) -> String {
    let (here, size) = (Bytes(image.here_bytes), Bytes(image.size_bytes));
    let here = match image.here_bytes >= image.size_bytes {
        true => "all here".to_owned(),
        false => format!("{here} of it here"),
    };
    let waits = match image.waiting {
        0 => String::new(),
        waiting => format!(", the pod waits for {waiting} chunks"),
    };
    let problem = image.problem.as_ref();
    format!(
        "  {}  {size}, {here}{waits}{}\n",
        image.name,
        problem.map_or_else(String::new, |problem| format!(": {problem}"))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_says_how_much_of_it_is_here_and_what_the_pod_waits_for() {
        let mut image = ImageInfo {
            name: "app:1".to_owned(),
            size_bytes: 4 << 20,
            here_bytes: 4 << 20,
            waiting: 0,
            problem: None,
        };
        assert_eq!(describe_image(&image), "  app:1  4.0 MiB, all here\n");
        image.here_bytes = 1 << 20;
        image.waiting = 2;
        image.problem = Some("peer b: does not have it".to_owned());
        assert_eq!(
            describe_image(&image),
            "  app:1  4.0 MiB, 1.0 MiB of it here, the pod waits for 2 chunks: peer b: does not have it\n"
        );
    }
}
