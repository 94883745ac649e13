//! Starting a pod again whose VM is gone, with the disks that it left.
//!
//! Its name, its addresses, its slot, its volumes and the right to run it are its own still: the guest boots anew, and its containers begin
//! again. Nothing is removed if that fails; the pod stays as it was.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vm_runtime::pod::{ContainerSpec, PodSpec};
use vm_runtime::spec::DiskSpec;
use vm_runtime::units::Epoch;
use vm_runtime::vm::VmRecord;

use super::boot::{BootOrder, check_memory, open_disks};
use super::disks::Origin;
use super::error::{Cause, PodError};
use super::handle::{Facts, waiting};
use super::logs::{LogStream, StreamKey};
use super::plan::{self, Plan};
use super::run::{base, check_claim};
use super::state::{self, PodFile, PodRecord};
use crate::daemon::node::Node;
use crate::image::ImageRecord;
use crate::migration::journal::OwnerState;

/// Why a pod is shown as failed that was being started again when its service ended.
pub(super) const INTERRUPTED: &str = "the service ended while it was being started again";

/// What its boot needs. Its folder says from here on that it is being started again, so that a service which finds it so ends what it
/// finds of a VM.
///
/// # Errors
/// The right to run it is not this node's any more, a VM of it cannot be ended, or an image, a disk or memory is missing.
pub(super) async fn prepare(
    node: &Node,
    facts: &Facts,
    epoch: Epoch,
    deadline: Duration,
) -> Result<BootOrder, PodError> {
    let name = facts.spec.name.as_str();
    is_owner(node, name, epoch).await?;
    check_claim(node, &facts.spec)?;
    check_memory(&facts.spec)?;
    let mut plan = planned(node, facts).await?;
    plan.configuration.output_offsets = output_offsets(facts);
    end_vm(&facts.dir)
        .await
        .map_err(|e| PodError::step(name, "end what is left of its VM", e))?;
    note(facts).await?;
    let images = super::images::serve(node, name, &facts.dir, &facts.vm_spec).await?;
    let disks = open_disks(node, facts, Origin::Found(epoch)).await?;
    Ok(BootOrder {
        configuration: Box::new(plan.configuration),
        images,
        disks,
        deadline,
    })
}

/// Ends every VMM of a pod, without talking to it.
///
/// # Errors
/// The kernel refuses, or does not end one in time.
pub(super) async fn end_vm(dir: &Path) -> std::io::Result<()> {
    VmRecord::kill_others(dir).await?;
    match VmRecord::load(dir) {
        Ok(record) => record.kill().await,
        Err(_) => Ok(()),
    }
}

/// Checks that the journal says so still.
async fn is_owner(node: &Node, pod: &str, epoch: Epoch) -> Result<(), PodError> {
    let (journal, name) = (Arc::clone(&node.journal), pod.to_owned());
    let owner = tokio::task::spawn_blocking(move || journal.owner(&name))
        .await
        .map_err(|e| PodError::step(pod, "read whose it is", e))?
        .map_err(|e| PodError::step(pod, "read whose it is", e))?;
    match owner {
        Some(owner) if owner.state == OwnerState::Owner && owner.epoch == epoch => Ok(()),
        Some(_) | None => Err(PodError::NotOwned(pod.to_owned())),
    }
}

/// What its agent is told, if its guest boots from the same kernel as before.
async fn planned(node: &Node, facts: &Facts) -> Result<Plan, PodError> {
    let name = facts.spec.name.as_str();
    let store = Arc::clone(&node.images);
    let (spec, disks) = (facts.spec.clone(), facts.vm_spec.disks.clone());
    let find = move || -> Result<Vec<Arc<ImageRecord>>, Cause> {
        let named = |image: &str| Ok(store.resolve(image)?.erofs_digest.to_string());
        let digests = digests(&spec, &disks, named)?;
        let one = |digest: String| -> Result<_, Cause> { Ok(store.record(&digest.parse()?)?) };
        digests.into_iter().map(one).collect()
    };
    let images = tokio::task::spawn_blocking(find)
        .await
        .unwrap_or_else(|e| Err(e.into()))
        .map_err(|e| PodError::step(name, "find its images", e))?;
    let (uuid, writable) = (facts.vm_spec.uuid.clone(), facts.vm_spec.writable.clone());
    let plan = plan::plan(&facts.spec, writable, &images, &base(node), uuid)?;
    let (was, is) = (&facts.vm_spec, &plan.vm);
    if was.kernel_sha256 != is.kernel_sha256 || was.initramfs_sha256 != is.initramfs_sha256 {
        return Err(PodError::OtherGuest(name.to_owned()));
    }
    Ok(plan)
}

/// What its containers have printed so far: its log goes on behind it.
fn output_offsets(facts: &Facts) -> Vec<(u64, u64)> {
    let printed = |container: &ContainerSpec, stream| {
        facts.logs.next_offset(&StreamKey {
            container: container.name.clone(),
            stream,
        })
    };
    let both = |container: &ContainerSpec| {
        (
            printed(container, LogStream::Stdout),
            printed(container, LogStream::Stderr),
        )
    };
    facts.spec.containers.iter().map(both).collect()
}

/// The image of each container as it was, whatever its name stands for by now. A VM has a disk for each image, in the order in which
/// containers first name it: so where it has as many disks as there are names, they pair up. Where two names were of one image, `named` tells.
fn digests(
    spec: &PodSpec,
    disks: &[DiskSpec],
    named: impl Fn(&str) -> Result<String, Cause>,
) -> Result<Vec<String>, Cause> {
    let mut names: Vec<&str> = Vec::new();
    for container in &spec.containers {
        if !names.contains(&container.image.as_str()) {
            names.push(&container.image);
        }
    }
    let disks: Vec<&str> = disks.iter().map(|d| d.image_digest.as_str()).collect();
    let one = |container: &ContainerSpec| -> Result<String, Cause> {
        let at = names.iter().position(|name| *name == container.image);
        if names.len() == disks.len()
            && let Some(digest) = at.and_then(|at| disks.get(at))
        {
            return Ok((*digest).to_owned());
        }
        let digest = named(&container.image)?;
        match disks.contains(&digest.as_str()) {
            true => Ok(digest),
            false => Err(format!(
                "`{}` is another image by now than the one that container `{}` had",
                container.image, container.name
            )
            .into()),
        }
    };
    spec.containers.iter().map(one).collect()
}

/// Notes that it is being started again.
async fn note(facts: &Facts) -> Result<(), PodError> {
    let file = PodFile {
        spec: facts.spec.clone(),
        vm: facts.vm_spec.clone(),
        slot: facts.slot,
        booting: false,
        starting_again: true,
        record: PodRecord {
            created_unix_ms: facts.created_unix_ms,
            containers: waiting(&facts.spec),
        },
    };
    let dir = facts.dir.clone();
    tokio::task::spawn_blocking(move || state::store(&dir, &file))
        .await
        .unwrap_or_else(|e| Err(std::io::Error::other(e)))
        .map_err(|source| PodError::State {
            verb: "write the record in",
            path: facts.dir.clone(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_runtime::units::Bytes;

    fn pod(images: &[&str]) -> PodSpec {
        let container =
            |(at, image): (usize, &&str)| format!("    - {{ name: c{at}, image: {image} }}\n");
        let containers: String = images.iter().enumerate().map(container).collect();
        let head = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: web\n  annotations: { migrator/ipv4: 10.77.0.9/24 }\n";
        PodSpec::from_yaml(&format!("{head}spec:\n  containers:\n{containers}")).unwrap()
    }

    fn disks(digests: &[&str]) -> Vec<DiskSpec> {
        let disk = |(at, digest): (usize, &&str)| DiskSpec {
            serial: format!("img{at}"),
            image_digest: (*digest).to_owned(),
            size: Bytes::mib(1),
        };
        digests.iter().enumerate().map(disk).collect()
    }

    #[test]
    fn containers_have_the_images_that_they_had() {
        let moved_on = |_: &str| Ok("other".to_owned());
        let found = digests(&pod(&["a", "b", "a"]), &disks(&["1", "2"]), moved_on).unwrap();
        assert_eq!(found, ["1", "2", "1"]);
        let same = |name: &str| Ok(if name == "c" { "2" } else { "1" }.to_owned());
        let found = digests(&pod(&["a", "b", "c"]), &disks(&["1", "2"]), same).unwrap();
        assert_eq!(found, ["1", "1", "2"]);
        let error = digests(&pod(&["a", "b", "c"]), &disks(&["1", "2"]), moved_on).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`a` is another image by now than the one that container `c0` had"
        );
    }
}
