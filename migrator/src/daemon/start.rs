//! Opening everything a node needs, in order; the first thing that fails is the error.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use vm_runtime::probe;
use vm_runtime::qemu::{QemuBinary, QemuConfig};
use vm_runtime::spec::MACHINE;

use super::DaemonError;
use super::migrations::MigrationRegistry;
use super::node::{GuestFiles, Node};
use crate::api::error::chain;
use crate::api::images::in_use;
use crate::config::{Config, Topology, Tunnel};
use crate::directory::Directory;
use crate::image::{Digest, ImageStore};
use crate::migration::driver::Arrivals;
use crate::migration::journal::{Journal, Recovery};
use crate::network::{Cluster, NodeNetConfig, NodeNetwork, TunnelConfig};
use crate::pods::PodRegistry;
use crate::pods::recover::OpenMigration;
use crate::registry::Registries;
use crate::storage::Storage;
use crate::supply::{PeerSource, Supply};
use crate::templates::Templates;
use crate::volumes::Volumes;
use crate::wire::tls::TlsConfig;

/// Keeps other services out of the state folder until it is dropped, or the process ends however it ends.
#[derive(Debug)]
pub(super) struct StateLock(#[expect(dead_code, reason = "held, not read")] Flock<File>);

/// How long a service that was killed may take to end: its threads leave one by one, and the lock goes with the last.
pub(super) const FORMER_ENDS_WITHIN: Duration = Duration::from_secs(5);

/// Makes the state folder and locks it, as soon as a former service lets go of it, and at most after `patience`.
pub(super) fn lock(state_dir: &Path, patience: Duration) -> Result<StateLock, DaemonError> {
    let failed = |source| DaemonError::StateDir {
        path: state_dir.to_owned(),
        source,
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(state_dir)
        .map_err(failed)?;
    let mut file = File::options()
        .create(true)
        .append(true)
        .open(state_dir.join("lock"))
        .map_err(failed)?;
    let until = Instant::now() + patience;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(StateLock(lock)),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() >= until => {
                return Err(DaemonError::Locked(state_dir.to_owned()));
            }
            Err((file, Errno::EWOULDBLOCK)) => file,
            Err((_, errno)) => return Err(failed(errno.into())),
        };
        // flock(2) can wait, but not with a limit.
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Makes a folder whose files are in memory (a tmpfs), or finds it: it outlives the service, and a busy disk does not hold up the
/// packets that are written to it. Where it cannot be mounted, the folder itself has to do.
fn memory_folder(dir: PathBuf) -> PathBuf {
    let mounted = || -> io::Result<()> {
        std::fs::create_dir_all(&dir)?;
        if statfs(&dir)?.filesystem_type() != TMPFS_MAGIC {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("tmpfs"), &dir, Some("tmpfs"), flags, Some("mode=0700"))?;
        }
        Ok(())
    };
    if let Err(error) = mounted() {
        tracing::warn!(dir = %dir.display(), %error, "no file system in memory: parked packets are spooled to the disk");
    }
    dir
}

/// Lets the process have as many descriptors as it may: a pod takes about ten, a migration more.
pub(super) fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Opens everything. Nothing runs yet, and nothing of a pod has been touched.
pub(super) async fn open(config: Config) -> Result<(Arc<Node>, Recovery), DaemonError> {
    let state = &config.state_dir;
    let tls = TlsConfig::load(&config.tls.cert, &config.tls.key, &config.tls.ca)
        .map_err(|e| DaemonError::open("the certificates", e))?;
    let guest = guest_files(&config).await?;
    let images_dir = state.join("images");
    let images = blocking(move || ImageStore::open(&images_dir))
        .await?
        .map_err(|e| DaemonError::open("the image store", e))?;
    let images = Arc::new(images);
    let (templates_dir, mode) = (state.join("templates"), config.templates);
    let limit = config.limits.template_bytes;
    let templates = blocking(move || Templates::open(templates_dir, mode, limit))
        .await?
        .map_err(|e| DaemonError::open("the templates", e))?;
    let qemu = QemuBinary::open(&QemuConfig {
        binary: config.qemu.binary.clone(),
        lib_dir: config.qemu.lib_dir.clone(),
        data_dirs: config.qemu.data_dirs.clone(),
    })
    .await
    .map_err(|e| DaemonError::open("QEMU", e))?;
    let machine = qemu.machine_or_newest(MACHINE).to_owned();
    let (accel, accel_reason) = probe::resolve(&qemu, config.qemu.accel)
        .await
        .map_err(|e| DaemonError::open("the accelerator", e))?;
    let (major, minor, micro) = qemu.version;
    tracing::info!(
        qemu = %qemu.path.display(),
        version = format!("{major}.{minor}.{micro}"),
        machine,
        accel = ?accel,
        reason = accel_reason,
        "guests will run under this VMM"
    );
    let network = NodeNetwork::open(NodeNetConfig {
        ground: config.ground(),
        uplink: config.uplink.as_str().to_owned(),
        xdp: config.xdp,
        bpffs: state.join("bpf"),
        spool_dir: memory_folder(state.join("spool")),
        tunnel: match config.tunnel {
            Tunnel::Off => None,
            Tunnel::Vxlan { vni, port, mtu } => Some(TunnelConfig { vni, port, mtu }),
        },
        park: config.park_limits(),
        bound_limit: config.forwarding.bound_limit(),
        cluster: cluster(&config),
    })
    .await
    .map_err(|e| DaemonError::open("the network", e))?;
    let journal_dir = state.join("journal");
    let (journal, recovery) = blocking(move || Journal::open(&journal_dir))
        .await?
        .map_err(|e| DaemonError::open("the journal", e))?;
    let migrations = MigrationRegistry::open(&state.join("migrations"))
        .map_err(|e| DaemonError::open("the reports of migrations", e))?;
    let shutdown = CancellationToken::new();
    let directory = network
        .endpoints()
        .map(|endpoints| Directory::new(Arc::clone(endpoints), tls.clone(), shutdown.clone()));
    let tasks = TaskTracker::new();
    let supply = Supply::new(Arc::clone(&images), shutdown.clone(), tasks.clone());
    for (peer, addr) in &config.peers {
        let source = PeerSource::start(peer.as_str(), *addr, tls.clone());
        supply.add(Arc::new(source));
    }
    let storage = Storage::open(&config.storage, config.name.as_str(), &config.state_dir)
        .map_err(|e| DaemonError::open("shared storage", e))?;
    let storage = Arc::new(storage);
    let registries = Registries::new(config.registries.clone(), Arc::clone(&images));
    supply.add(registries.source());
    let node = Node {
        registries,
        images,
        supply,
        templates: Arc::new(templates),
        volumes: Volumes::new(config.state_dir.join("volumes")),
        storage,
        network,
        qemu,
        machine,
        accel,
        accel_reason,
        guest,
        tls,
        journal: Arc::new(journal),
        directory,
        pods: PodRegistry::default(),
        migrations,
        arrivals: Arrivals::default(),
        found: CancellationToken::new(),
        shutdown,
        tasks,
        config,
    };
    Ok((Arc::new(node), recovery))
}

/// Removes images whose pods were on their way here when an earlier service died. Only where each pod is known that may use one.
pub(super) async fn release_images(node: &Arc<Node>, open: &[OpenMigration]) {
    let mut lacking = open.iter();
    if lacking.any(|migration| matches!(migration, OpenMigration::Lacking { .. })) {
        return;
    }
    let node = Arc::clone(node);
    let released = blocking(move || {
        let found = node.pods.list();
        let known = |folder: &std::fs::DirEntry| {
            let name = folder.file_name();
            found.iter().any(|pod| name == *pod.name())
        };
        let mut folders = std::fs::read_dir(node.pods_dir())
            .into_iter()
            .flatten()
            .flatten();
        if !folders.all(|folder| known(&folder)) {
            return Ok(Vec::new());
        }
        let used: Vec<Digest> = in_use(&node).into_iter().map(|(image, _)| image).collect();
        node.images.release_arriving(&used, SystemTime::now())
    });
    match released.await {
        Ok(Ok(images)) => {
            for image in images {
                tracing::info!(image = image.name, "released: its pod has not come");
            }
        }
        Ok(Err(error)) => {
            tracing::warn!(
                error = chain(&error),
                "images of pods that have not come stay"
            );
        }
        Err(error) => {
            tracing::warn!(
                error = chain(&error),
                "images of pods that have not come stay"
            );
        }
    }
}

/// The other nodes, where pods are routed.
fn cluster(config: &Config) -> Option<Cluster> {
    match config.topology {
        Topology::Bridge => None,
        Topology::Routed { .. } => Some(Cluster {
            name: config.name.to_string(),
            peers: config
                .peers
                .iter()
                .map(|(name, addr)| (name.to_string(), addr.ip()))
                .collect(),
        }),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, DaemonError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| DaemonError::open("a thread", e))
}

async fn guest_files(config: &Config) -> Result<GuestFiles, DaemonError> {
    let kernel = config.guest.kernel.clone();
    let initramfs = config.guest.initramfs.clone();
    blocking(move || {
        Ok(GuestFiles {
            kernel_sha256: sha256(&kernel)?,
            initramfs_sha256: sha256(&initramfs)?,
            kernel,
            initramfs,
        })
    })
    .await?
}

fn sha256(path: &PathBuf) -> Result<String, DaemonError> {
    let hash = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            hasher.update(buffer.get(..read).unwrap_or_default());
        }
        Ok(hasher
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect())
    };
    hash().map_err(|source| DaemonError::GuestFile {
        path: path.clone(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_folder_serves_one_service_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let first = lock(&state, Duration::ZERO).unwrap();
        assert!(matches!(
            lock(&state, Duration::ZERO),
            Err(DaemonError::Locked(_))
        ));
        let ends = std::thread::spawn(move || drop(first));
        lock(&state, FORMER_ENDS_WITHIN).unwrap();
        ends.join().unwrap();
    }

    #[test]
    fn files_are_known_by_their_hash() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(
            sha256(&path).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
