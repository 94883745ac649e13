//! `run`: from YAML to a running pod.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use vm_runtime::pod::PodSpec;
use vm_runtime::spec::{VmSpec, WritableDisk};
use vm_runtime::units::Epoch;

use super::actor::{self, Birth};
use super::addressing;
use super::boot::{BootOrder, check_memory, open_disks};
use super::disks::{self, Origin};
use super::error::PodError;
use super::handle::{Facts, PodHandle, waiting};
use super::logs::LogStore;
use super::plan::{self, Base, Plan};
use super::state::{self, PodFile, PodRecord, unix_ms};
use crate::config::Topology;
use crate::daemon::node::Node;
use crate::image::{ImageRecord, StoreError};
use crate::network::Claim;
use crate::registry::{Meter, PullOptions, Reference};
use crate::templates;

/// For how long `image gc` leaves an image alone that was pulled for a pod, as `image pull` does.
const LEASE: Duration = Duration::from_secs(3600);

/// Runs the pod that `yaml` describes; with `wait`, returns when its containers have started.
///
/// # Errors
/// Everything is as before, and the name is free again; without `wait`, a failure to start is shown as
/// the pod's state.
pub async fn run(
    node: &Arc<Node>,
    yaml: &str,
    wait: bool,
    deadline: Duration,
) -> Result<PodHandle, PodError> {
    let mut spec = PodSpec::from_yaml(yaml).map_err(|e| PodError::Spec(e.into()))?;
    if let Topology::Routed { pods } = &node.config.topology {
        addressing::route(&mut spec, pods).map_err(|e| PodError::Spec(e.into()))?;
    }
    let limit = node.config.longest_pod_name();
    if spec.name.len() > limit {
        return Err(PodError::NameTooLong {
            name: spec.name,
            limit,
        });
    }
    check_claim(node, &spec)?;
    let reservation = node.pods.reserve(&spec, node.config.limits.pods)?;
    let (images, plan) = planned(node, &spec).await?;
    check_memory(&spec)?;
    // Until the pod is registered, nothing else says that its images are needed.
    let _hold = node
        .images
        .hold(images.iter().map(|image| image.erofs_digest));
    let file = PodFile {
        vm: plan.vm,
        slot: reservation.slot(),
        booting: true,
        starting_again: false,
        record: PodRecord {
            created_unix_ms: unix_ms(),
            containers: waiting(&spec),
        },
        spec,
    };
    let epoch = own(node, &file.spec.name).await?;
    let facts = make_folder(node, file).await?;
    let made = async {
        let images = super::images::serve(node, &facts.spec.name, &facts.dir, &facts.vm_spec);
        let images = images.await?;
        Ok((images, open_disks(node, &facts, Origin::New(epoch)).await?))
    };
    let (images, disks) = match made.await {
        Ok(made) => made,
        Err(error) => {
            give_back(node, &facts.vm_spec, epoch).await;
            // The first error is the one to tell; what stays is removed at the next start.
            let _ = remove_folder(&facts.dir).await;
            let _ = node.journal.stop_owner(&facts.spec.name);
            return Err(error);
        }
    };
    let (started, result) = oneshot::channel();
    let order = BootOrder {
        configuration: Box::new(plan.configuration),
        images,
        disks,
        deadline,
    };
    let birth = Birth::Boot {
        order,
        started: wait.then_some(started),
    };
    let handle = actor::spawn(node, reservation, facts, epoch, None, birth);
    if wait {
        // The actor drops the sender only when it panics, which its log tells.
        result.await.map_err(|_| PodError::ShuttingDown)??;
    }
    Ok(handle)
}

/// Refuses addresses that a pod of another node has.
///
/// # Errors
/// [`PodError::AddressElsewhere`], where pods are routed.
pub(super) fn check_claim(node: &Node, spec: &PodSpec) -> Result<(), PodError> {
    let Some(endpoints) = node.network.endpoints() else {
        return Ok(());
    };
    // Which epoch it will have makes no difference here.
    let claim = Claim {
        mac: spec.net.mac,
        v4: spec.net.ipv4.map(|(address, _)| address),
        v6: spec.net.ipv6.map(|(address, _)| address),
        epoch: Epoch(0),
    };
    match endpoints.conflict(&claim) {
        Some((mac, node)) => Err(PodError::AddressElsewhere { mac, node }),
        None => Ok(()),
    }
}

/// What this node gives to every VM.
pub(super) fn base(node: &Node) -> Base<'_> {
    Base {
        machine: &node.machine,
        accel: node.accel,
        kernel_sha256: &node.guest.kernel_sha256,
        initramfs_sha256: &node.guest.initramfs_sha256,
        routed_mtu: node.network.routed_mtu(),
    }
}

/// The VM that a pod would have here, without what is its own.
///
/// # Errors
/// The YAML is no pod, or its images or volumes are not here.
pub async fn shape_of(node: &Node, yaml: &str) -> Result<VmSpec, PodError> {
    let spec = PodSpec::from_yaml(yaml).map_err(|e| PodError::Spec(e.into()))?;
    let (_, plan) = planned(node, &spec).await?;
    Ok(templates::shape(&plan.vm))
}

/// Its images, and what it is to become.
async fn planned(node: &Node, spec: &PodSpec) -> Result<(Vec<Arc<ImageRecord>>, Plan), PodError> {
    let images = images(node, spec).await?;
    let uuid = plan::uuid(crate::wire::id::MigrationId::random().0);
    let writable = writable(node, spec, &uuid).await?;
    let plan = plan::plan(spec, writable, &images, &base(node), uuid)?;
    Ok((images, plan))
}

/// The disks that it can write to.
async fn writable(node: &Node, spec: &PodSpec, uuid: &str) -> Result<Vec<WritableDisk>, PodError> {
    let (volumes, wanted) = (node.volumes.clone(), spec.clone());
    let (storage, uuid) = (Arc::clone(&node.storage), uuid.to_owned());
    tokio::task::spawn_blocking(move || disks::plan(&wanted, &volumes, &storage, &uuid))
        .await
        .map_err(|e| PodError::step(&spec.name, "look up its volumes", e))?
        .map_err(|source| PodError::Volume {
            pod: spec.name.clone(),
            source: Box::new(source),
        })
}

/// Journals the right to run a new pod.
async fn own(node: &Node, pod: &str) -> Result<Epoch, PodError> {
    let journal = Arc::clone(&node.journal);
    let name = pod.to_owned();
    tokio::task::spawn_blocking(move || journal.create_owner(&name))
        .await
        .map_err(|e| PodError::step(pod, "journal the right to run it", e))?
        .map_err(|e| PodError::step(pod, "journal the right to run it", e))
}

/// The image of each container. One that is not here is pulled, if the configuration says `registries.lazy`: then that is quick.
async fn images(node: &Node, spec: &PodSpec) -> Result<Vec<Arc<ImageRecord>>, PodError> {
    for _ in &spec.containers {
        match images_here(node, spec).await {
            Err(PodError::NoImage { container, image }) if node.config.registries.lazy => {
                pull(node, container, image).await?;
            }
            found => return found,
        }
    }
    images_here(node, spec).await
}

/// Pulls an image by its name in the pod's file.
async fn pull(node: &Node, container: String, image: String) -> Result<(), PodError> {
    let Ok(reference) = image.parse::<Reference>() else {
        return Err(PodError::NoImage { container, image });
    };
    let options = PullOptions {
        name: Some(image.clone()),
        lazy: true,
        lease: LEASE,
        ..PullOptions::default()
    };
    let (meter, _progress) = Meter::new();
    let pulled = node
        .registries
        .pull(&reference, &options, &meter, &node.shutdown);
    let pulled = pulled.await.map_err(|source| PodError::Pull {
        container,
        image,
        source: Box::new(source),
    })?;
    if pulled.lazy {
        node.supply.fill(&Arc::new(pulled.record));
    }
    Ok(())
}

async fn images_here(node: &Node, spec: &PodSpec) -> Result<Vec<Arc<ImageRecord>>, PodError> {
    let store = Arc::clone(&node.images);
    let wanted: Vec<(String, String)> = spec
        .containers
        .iter()
        .map(|c| (c.name.clone(), c.image.clone()))
        .collect();
    let find = move || {
        wanted
            .into_iter()
            .map(|(container, image)| match store.resolve(&image) {
                Ok(record) => Ok(Arc::new(record)),
                Err(StoreError::NotFound(_)) => Err(PodError::NoImage { container, image }),
                Err(source) => Err(PodError::Image {
                    container,
                    image,
                    source: source.into(),
                }),
            })
            .collect()
    };
    tokio::task::spawn_blocking(find)
        .await
        .map_err(|e| PodError::step(&spec.name, "look up its images", e))?
}

/// Makes a pod's folder with its record and its log.
pub(super) async fn make_folder(node: &Node, file: PodFile) -> Result<Facts, PodError> {
    let pods = node.pods_dir();
    let limit = node.config.limits.log_bytes;
    let name = file.spec.name.clone();
    let path = pods.join(&name);
    let make = {
        let file = file.clone();
        move || {
            // A folder that no pod of the register owns is what a crash left half removed.
            state::remove_folder(&pods.join(&name))?;
            let dir = state::create_folder(&pods, &name)?;
            let logs = state::store(&dir, &file)
                .and_then(|()| LogStore::open(&dir.join("logs"), limit))
                .inspect_err(|_| {
                    // The first error is the one to tell.
                    let _ = state::remove_folder(&dir);
                })?;
            Ok((dir, logs))
        }
    };
    let failed = |source| PodError::State {
        verb: "make the folder",
        path,
        source,
    };
    let (dir, logs) = tokio::task::spawn_blocking(make)
        .await
        .unwrap_or_else(|e| Err(std::io::Error::other(e)))
        .map_err(failed)?;
    Ok(Facts {
        node: node.config.name.as_str().to_owned(),
        created_unix_ms: file.record.created_unix_ms,
        spec: file.spec,
        vm_spec: file.vm,
        slot: file.slot,
        dir,
        logs: Arc::new(logs),
    })
}

/// Gives back what a pod has of shared storage, off the runtime's threads: its VM is gone, or never was.
pub(super) async fn give_back(node: &Node, vm: &VmSpec, epoch: Epoch) {
    if vm.writable.iter().all(|disk| disk.shared.is_none()) {
        return;
    }
    let (storage, vm) = (Arc::clone(&node.storage), vm.clone());
    let given = tokio::task::spawn_blocking(move || storage.give_back_all(&vm, epoch)).await;
    if let Err(error) = given {
        tracing::error!(%error, "what a pod had of shared storage is not given back");
    }
}

/// Removes a pod's folder, off the runtime's threads.
pub(super) async fn remove_folder(dir: &Path) -> Result<(), PodError> {
    let path = dir.to_owned();
    let failed = |source| PodError::State {
        verb: "remove",
        path: dir.to_owned(),
        source,
    };
    tokio::task::spawn_blocking(move || state::remove_folder(&path))
        .await
        .unwrap_or_else(|e| Err(std::io::Error::other(e)))
        .map_err(failed)
}
