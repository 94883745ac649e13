//! Volumes and where containers have them: from YAML, and what holds for all.

use std::collections::BTreeSet;

use guest_agent::protocol::settings::{MemoryMount, MemoryVolume};

use super::limits::bytes;
use super::validate::{label, text};
use super::yaml::{Node, invalid};
use super::{PodError, PodSpec, VolumeMount, VolumeSource, VolumeSpec};
use crate::units::Bytes;

/// The smallest disk: what is less has no room beside the file system's own tables.
const MIN_SIZE: Bytes = Bytes::mib(32);

/// The largest disk, 8 TiB.
const MAX_SIZE: Bytes = Bytes::mib(8 << 20);

/// Most volumes of a pod: each is a block device, beside those of the images.
const MAX_VOLUMES: usize = 8;

/// Longest path of a mount: PATH_MAX of Linux without the final zero.
const MAX_PATH: usize = 4095;

/// A volume as it is written: a disk, or memory.
enum Written {
    Disk(VolumeSpec),
    Memory(MemoryVolume),
}

/// Those on disks, and those in memory.
pub(super) fn volumes(
    node: Option<Node<'_>>,
) -> Result<(Vec<VolumeSpec>, Vec<MemoryVolume>), PodError> {
    let (mut disks, mut memory) = (Vec::new(), Vec::new());
    for node in node.map_or(Ok(Vec::new()), |node| node.list())? {
        match volume(&node)? {
            Written::Disk(volume) => disks.push(volume),
            Written::Memory(volume) => memory.push(volume),
        }
    }
    Ok((disks, memory))
}

/// The mounts of volumes on disks, and of those in memory.
pub(super) fn by_kind(
    mounts: &[VolumeMount],
    memory: &[MemoryVolume],
) -> (Vec<VolumeMount>, Vec<MemoryMount>) {
    let in_memory = |mount: &&VolumeMount| memory.iter().any(|v| v.name == mount.volume);
    let (memory, disks): (Vec<_>, Vec<_>) = mounts.iter().partition(in_memory);
    let memory = memory.into_iter().map(|mount| MemoryMount {
        volume: mount.volume.clone(),
        path: mount.path.clone(),
        read_only: mount.read_only,
    });
    (disks.into_iter().cloned().collect(), memory.collect())
}

fn volume(node: &Node<'_>) -> Result<Written, PodError> {
    let mut fields = node.fields()?;
    let name = fields.require("name", "containers mount it by its name")?;
    let name = name.text()?.to_owned();
    let empty = fields.get("emptyDir");
    let claim = fields.get("persistentVolumeClaim");
    fields.finish()?;
    let source = match (empty, claim) {
        (Some(empty), None) => {
            let mut fields = empty.fields()?;
            let in_memory = match fields.get("medium") {
                Some(node) => match node.text()? {
                    "" => false,
                    "Memory" => true,
                    other => {
                        let problem =
                            format!("`{other}` is neither `Memory` nor empty, which is a disk");
                        return invalid(&node.path, problem);
                    }
                },
                None => false,
            };
            if in_memory {
                let size = match fields.get("sizeLimit") {
                    Some(node) => Some(bytes(&node.path, &node.text_or_number()?)?.0),
                    None => None,
                };
                fields.finish()?;
                return Ok(Written::Memory(MemoryVolume { name, size }));
            }
            let hint = "a volume is a disk: say how large, such as 1Gi; or write `medium: Memory`";
            let size = fields.require("sizeLimit", hint)?;
            let size = bytes(&size.path, &size.text_or_number()?)?;
            fields.finish()?;
            VolumeSource::EmptyDir {
                size: Bytes::mib(size.0.div_ceil(1 << 20)),
            }
        }
        (None, Some(claim)) => {
            let mut fields = claim.fields()?;
            let hint = "name one of `migrator volume ls`";
            let volume = fields.require("claimName", hint)?.text()?.to_owned();
            fields.finish()?;
            VolumeSource::Claim { volume }
        }
        (None, None) | (Some(_), Some(_)) => {
            return invalid(
                &node.path,
                "must have one of `emptyDir` and `persistentVolumeClaim`",
            );
        }
    };
    Ok(Written::Disk(VolumeSpec { name, source }))
}

pub(super) fn volume_mounts(node: Option<Node<'_>>) -> Result<Vec<VolumeMount>, PodError> {
    let Some(node) = node else {
        return Ok(Vec::new());
    };
    let mount = |node: &Node<'_>| {
        let mut fields = node.fields()?;
        let volume = fields.require("name", "name one of `spec.volumes`")?;
        let volume = volume.text()?.to_owned();
        let path = fields.require("mountPath", "say where the container finds it")?;
        let path = path.text()?.to_owned();
        let read_only = match fields.get("readOnly") {
            Some(node) => node.truth()?,
            None => false,
        };
        fields.finish()?;
        Ok(VolumeMount {
            volume,
            path,
            read_only,
        })
    };
    node.list()?.iter().map(mount).collect()
}

/// What holds for the volumes of every pod, and for their mounts.
pub(super) fn check(pod: &PodSpec) -> Result<(), PodError> {
    if pod.volumes.len() > MAX_VOLUMES {
        return invalid(
            "spec.volumes",
            format!("a pod has at most {MAX_VOLUMES} volumes"),
        );
    }
    let (mut names, mut claims) = (BTreeSet::new(), BTreeSet::new());
    for (index, volume) in pod.volumes.iter().enumerate() {
        let path = format!("spec.volumes[{index}]");
        label(&format!("{path}.name"), &volume.name)?;
        if !names.insert(&volume.name) {
            let problem = format!("`{}` is the name of another volume too", volume.name);
            return invalid(&format!("{path}.name"), problem);
        }
        match &volume.source {
            VolumeSource::EmptyDir { size } => {
                size_of(&format!("{path}.emptyDir.sizeLimit"), *size)?
            }
            VolumeSource::Claim { volume } => {
                let path = format!("{path}.persistentVolumeClaim.claimName");
                label(&path, volume)?;
                if !claims.insert(volume) {
                    return invalid(&path, "is another volume of this pod too: mount that twice");
                }
            }
        }
    }
    for volume in &pod.settings.memory_volumes {
        if !names.insert(&volume.name) {
            let problem = format!("`{}` is the name of another volume too", volume.name);
            return invalid("spec.volumes[].name", problem);
        }
        if volume.size.is_some_and(|size| size > pod.memory.0) {
            return invalid(
                "spec.volumes[].emptyDir.sizeLimit",
                "is more than the guest's memory",
            );
        }
    }
    if let Some(size) = pod.root_disk() {
        size_of(
            "spec.containers[].resources.limits[\"ephemeral-storage\"]",
            size,
        )?;
    }
    for (index, container) in pod.containers.iter().enumerate() {
        let mut places = BTreeSet::new();
        let disks = container.volume_mounts.iter().map(|m| (&m.volume, &m.path));
        let memory = container.settings.memory_mounts.iter();
        let memory = memory.map(|m| (&m.volume, &m.path));
        for (at, (volume, mount)) in disks.chain(memory).enumerate() {
            let path = format!("spec.containers[{index}].volumeMounts[{at}]");
            if !names.contains(volume) {
                let problem = format!("the pod has no volume `{volume}`");
                return invalid(&format!("{path}.name"), problem);
            }
            let path = format!("{path}.mountPath");
            text(&path, mount, MAX_PATH)?;
            let parts: Vec<&str> = mount.split('/').filter(|p| !p.is_empty()).collect();
            let odd = parts.iter().any(|part| matches!(*part, "." | ".."));
            if !mount.starts_with('/') || parts.is_empty() || odd {
                return invalid(&path, "must be absolute, not `/`, and without `.` and `..`");
            }
            if !places.insert(parts) {
                return invalid(&path, "has another volume there already");
            }
        }
    }
    Ok(())
}

fn size_of(path: &str, size: Bytes) -> Result<(), PodError> {
    match (MIN_SIZE..=MAX_SIZE).contains(&size) {
        true => Ok(()),
        false => invalid(
            path,
            format!("a disk of {size} is not between {MIN_SIZE} and {MAX_SIZE}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(limits: &str, volumes: &str, mounts: &str) -> Result<PodSpec, PodError> {
        PodSpec::from_yaml(&format!(
            "{{metadata: {{name: p, annotations: {{migrator/ipv4: 10.77.0.9/24}}}}, spec: {{volumes: [{volumes}], containers: [\
             {{name: a, image: i, resources: {{limits: {{{limits}}}}}, volumeMounts: [{mounts}]}}, {{name: b, image: i}}]}}}}"
        ))
    }

    fn refused(limits: &str, volumes: &str, mounts: &str) -> String {
        pod(limits, volumes, mounts).unwrap_err().to_string()
    }

    #[test]
    fn disks_are_asked_for_as_in_kubernetes() {
        let volumes = "{name: s, emptyDir: {sizeLimit: 64Mi}}, {name: d, persistentVolumeClaim: {claimName: web-data}}";
        let mounts = "{name: d, mountPath: /data, readOnly: true}, {name: s, mountPath: /tmp/s}";
        let spec = pod("ephemeral-storage: 100M", volumes, mounts).unwrap();
        assert_eq!(spec.root_disk(), Some(Bytes::mib(96)));
        assert_eq!(spec.claims().collect::<Vec<_>>(), ["web-data"]);
        assert_eq!(
            spec.volumes[0].source,
            VolumeSource::EmptyDir {
                size: Bytes::mib(64)
            }
        );
        let mount = &spec.containers[0].volume_mounts[0];
        assert!(mount.read_only && mount.path == "/data");
        assert_eq!(pod("", "", "").unwrap().root_disk(), None);
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<PodSpec>(&text).unwrap(), spec);
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_path() {
        let scratch = "{name: s, emptyDir: {sizeLimit: 64Mi}}";
        for (found, wanted) in [
            (
                refused("ephemeral-storage: 1Ki", "", ""),
                "not between 32.0 MiB",
            ),
            (
                refused("", "{name: s, emptyDir: {}}", ""),
                "spec.volumes[0].emptyDir.sizeLimit: required",
            ),
            (
                refused("", "{name: s, emptyDir: {sizeLimit: 9Ti}}", ""),
                "not between",
            ),
            (
                refused("", "{name: s, hostPath: {path: /}}", ""),
                "spec.volumes[0].hostPath: not supported",
            ),
            (refused("", "{name: s}", ""), "must have one of"),
            (
                refused("", &format!("{scratch}, {scratch}"), ""),
                "name of another volume",
            ),
            (
                refused(
                    "",
                    "{name: s, persistentVolumeClaim: {claimName: ../x}}",
                    "",
                ),
                "claimName: `../x` is not a name",
            ),
            (
                refused("", scratch, "{name: x, mountPath: /a}"),
                "no volume `x`",
            ),
            (
                refused("", scratch, "{name: s, mountPath: a}"),
                "must be absolute",
            ),
            (
                refused("", scratch, "{name: s, mountPath: /a/../..}"),
                "must be absolute",
            ),
            (
                refused(
                    "",
                    scratch,
                    "{name: s, mountPath: /a}, {name: s, mountPath: //a/}",
                ),
                "another volume there",
            ),
        ] {
            assert!(found.contains(wanted), "{found}");
        }
    }
}
