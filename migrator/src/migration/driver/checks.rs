//! What a destination looks at before it takes a pod. Pure: the facts come in as an argument.

use vm_runtime::spec::Accel;
use vm_runtime::units::Bytes;

use crate::block::granule::check_size;
use crate::config::Topology;
use crate::daemon::node::Node;
use crate::pods::addressing;
use crate::pods::plan::ordinary_and_huge;
use crate::wire::message::{DiskOffer, Offer, Refuse, RefuseCode, RoutedOffer};

/// This node, as far as an offer can disagree with it.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// Its name.
    pub(super) node: String,
    /// QEMU's version, such as `7.2.22`.
    pub(super) qemu_version: String,
    /// Machine types that its QEMU knows.
    pub(super) machine_types: Vec<String>,
    /// CPU models that this build starts.
    pub(super) cpu: String,
    /// What runs its guests.
    pub(super) accel: Accel,
    /// SHA-256 of its guest kernel, hex.
    pub kernel_sha256: String,
    /// SHA-256 of its initramfs, hex.
    pub initramfs_sha256: String,
    /// Memory that is available now.
    pub(super) memory_available: Bytes,
    /// Huge pages that are available now.
    pub(super) huge_available: Bytes,
    /// What QEMU takes beside guest RAM.
    pub(super) vmm_overhead: Bytes,
    /// Room for disks: what is free on the file system of the state folder.
    pub(super) disk_available: Bytes,
    /// Kernel features that are missing, by name; empty when all are there.
    pub(super) missing_features: Vec<String>,
    /// How its pods are routed; `None` if they are on a bridge.
    pub(super) routed: Option<RoutedOffer>,
}

/// How a node's pods are routed; `None` if they are on a bridge.
pub(super) fn routed(node: &Node) -> Option<RoutedOffer> {
    match (&node.config.topology, node.network.routed_mtu()) {
        (Topology::Routed { pods }, Some(mtu)) => Some(RoutedOffer {
            pods: pods.clone(),
            mtu,
        }),
        (Topology::Routed { .. } | Topology::Bridge, _) => None,
    }
}

/// Refuses an offer that does not fit this node. Names, addresses and images are checked by those who own them.
///
/// # Errors
/// The first thing that does not fit, with what to do.
pub(super) fn check(offer: &Offer, here: &Facts) -> Result<(), Refuse> {
    let node = &here.node;
    let refuse = |code, reason: String| Err(Refuse { code, reason });
    if offer.ram != offer.vm.memory
        || offer.vm.memory != offer.pod.memory
        || offer.vm.hugepages != offer.pod.hugepages
        || offer.vm.name != offer.pod.name
    {
        let reason =
            "the offer contradicts itself: its pod, its VM and its RAM size differ".to_owned();
        return refuse(RefuseCode::Internal, reason);
    }
    if let Some(reason) = differ(offer, here) {
        return refuse(RefuseCode::Topology, reason);
    }
    if !here.missing_features.is_empty() {
        let missing = here.missing_features.join(", ");
        let reason = format!("{node}'s kernel lacks {missing}; run `migrator doctor` there");
        return refuse(RefuseCode::KernelFeature, reason);
    }
    let (ordinary, huge) = ordinary_and_huge(offer.ram, offer.vm.hugepages);
    if here.huge_available < huge {
        let available = here.huge_available;
        let reason = format!(
            "the pod needs {huge} of huge pages, and {node} has {available} available; raise vm.nr_hugepages there, or choose another node"
        );
        return refuse(RefuseCode::Memory, reason);
    }
    let need = Bytes(ordinary.0.saturating_add(here.vmm_overhead.0));
    if here.memory_available < need {
        let available = here.memory_available;
        let reason = format!(
            "the pod needs {need} of memory, and {node} has {available} available; free some, or choose another node"
        );
        return refuse(RefuseCode::Memory, reason);
    }
    if let Some(refused) = disks(offer, here) {
        return Err(refused);
    }
    let machine = &offer.vm.machine;
    if !here.machine_types.contains(machine) {
        let reason = format!(
            "{node}'s QEMU {} does not know the machine type {machine}; install a newer QEMU there",
            here.qemu_version
        );
        return refuse(RefuseCode::MachineType, reason);
    }
    let (ours, theirs) = (
        major_minor(&here.qemu_version),
        major_minor(&offer.qemu_version),
    );
    if ours < theirs {
        let reason = format!(
            "the pod runs under QEMU {}, and {node} has the older {}: device state moves to the same version or a newer one",
            offer.qemu_version, here.qemu_version
        );
        return refuse(RefuseCode::QemuVersion, reason);
    }
    if offer.vm.accel != here.accel {
        let reason = format!(
            "the pod runs under {}, and {node} runs guests under {}: state saved under one does not load under the other",
            accel(offer.vm.accel),
            accel(here.accel)
        );
        return refuse(RefuseCode::Accel, reason);
    }
    if offer.vm.cpu != here.cpu {
        let reason = format!(
            "the pod's CPU model is {}, and {node} offers {}",
            offer.vm.cpu, here.cpu
        );
        return refuse(RefuseCode::CpuModel, reason);
    }
    if offer.vm.kernel_sha256 != here.kernel_sha256
        || offer.vm.initramfs_sha256 != here.initramfs_sha256
    {
        let reason = format!(
            "{node} has another guest kernel or initramfs; install the same on both nodes (keys guest.kernel and guest.initramfs)"
        );
        return refuse(RefuseCode::GuestKernel, reason);
    }
    Ok(())
}

/// Why the pod's writable disks have no place here.
fn disks(offer: &Offer, here: &Facts) -> Option<Refuse> {
    let node = &here.node;
    let none = |disk: &DiskOffer| check_size(disk.size).is_err() || disk.allocated > 2 * disk.size;
    let moving = offer.vm.writable.iter().filter(|vm| vm.shared.is_none());
    let same = offer.disks.len() == moving.clone().count()
        && offer
            .disks
            .iter()
            .zip(moving)
            .all(|(disk, vm)| disk.name == vm.name && disk.size == vm.size.0);
    if !same {
        return Some(Refuse {
            code: RefuseCode::Internal,
            reason: "the offer contradicts itself: its disks are not those of its VM".to_owned(),
        });
    }
    if let Some(disk) = offer.disks.iter().find(|disk| none(disk)) {
        return Some(Refuse {
            code: RefuseCode::Internal,
            reason: format!(
                "the offered disk {} has {} bytes, of which {} are in use: no disk has",
                disk.name, disk.size, disk.allocated
            ),
        });
    }
    let need = offer.disks.iter().map(|disk| disk.allocated);
    let need = Bytes(need.fold(0, u64::saturating_add));
    (need > here.disk_available).then(|| Refuse {
        code: RefuseCode::Disk,
        reason: format!(
            "the pod's disks hold {need}, and {node} has {} free where it keeps its state; free some, or choose another node",
            here.disk_available
        ),
    })
}

/// Why the pod's addresses and its MTU would not do here.
fn differ(offer: &Offer, here: &Facts) -> Option<String> {
    let (source, node) = (&offer.source, &here.node);
    match (&offer.routed, &here.routed) {
        (None, None) => None,
        (Some(_), None) => Some(format!(
            "{source} has its pods routed, and {node} has them on a bridge: set the same `topology` on both"
        )),
        (None, Some(_)) => Some(format!(
            "{source} has its pods on a bridge, and {node} has them routed: set the same `topology` on both"
        )),
        (Some(from), Some(to)) if from.pods != to.pods => Some(format!(
            "the networks of pods are {} on {source}, and {} on {node}: set the same `topology.pods` on every node",
            from.pods, to.pods
        )),
        (Some(from), Some(to)) if from.mtu != to.mtu => Some(format!(
            "packets of pods are up to {} bytes long on {source}, and {} on {node}: set the same `tunnel.mtu` on every node",
            from.mtu, to.mtu
        )),
        (Some(_), Some(to)) => addressing::check(&offer.pod.net, &to.pods)
            .err()
            .map(|error| format!("the pod cannot be on {node}: {error}")),
    }
}

fn accel(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "KVM",
        Accel::Tcg => "TCG, QEMU's emulator",
    }
}

/// `7.2.22` is `(7, 2)`. What cannot be read counts as old.
fn major_minor(version: &str) -> (u32, u32) {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use vm_runtime::spec::WritableDisk;

    use super::*;
    use crate::wire::golden::offer;

    /// A node that takes [`offer`], and has no byte to spare.
    fn here() -> Facts {
        Facts {
            node: "b".to_owned(),
            qemu_version: "7.2.22".to_owned(),
            machine_types: vec!["pc-q35-7.2".to_owned()],
            cpu: "max".to_owned(),
            accel: Accel::Tcg,
            kernel_sha256: String::new(),
            initramfs_sha256: String::new(),
            memory_available: Bytes::mib(612),
            huge_available: Bytes(0),
            vmm_overhead: Bytes::mib(100),
            disk_available: Bytes::mib(10),
            missing_features: Vec::new(),
            routed: None,
        }
    }

    fn routed(pods: &str, mtu: u32) -> Option<RoutedOffer> {
        let pods = vec![pods.parse().unwrap()].try_into().unwrap();
        Some(RoutedOffer { pods, mtu })
    }

    #[test]
    fn nodes_of_different_topologies_do_not_move_pods_to_each_other() {
        for (there, our, says) in [
            (None, routed("10.77.0.0/24", 1450), "b has them routed"),
            (routed("10.77.0.0/24", 1450), None, "b has them on a bridge"),
            (
                routed("10.77.0.0/24", 1450),
                routed("10.77.0.0/16", 1450),
                "10.77.0.0/24 on a, and 10.77.0.0/16 on b",
            ),
            (
                routed("10.77.0.0/24", 1450),
                routed("10.77.0.0/24", 1430),
                "1450 bytes long on a, and 1430 on b",
            ),
            (
                routed("10.99.0.0/24", 1450),
                routed("10.99.0.0/24", 1450),
                "10.77.0.10 is in none",
            ),
        ] {
            let (mut offer, mut here) = (offer(), here());
            (offer.routed, here.routed) = (there, our);
            let refused = super::check(&offer, &here).unwrap_err();
            assert_eq!(refused.code, RefuseCode::Topology);
            assert!(refused.reason.contains(says), "{says}: {}", refused.reason);
        }
        let (mut offer, mut here) = (offer(), here());
        offer.routed = routed("10.77.0.0/24", 1450);
        here.routed.clone_from(&offer.routed);
        super::check(&offer, &here).unwrap();
    }

    #[test]
    fn memory_of_the_kind_that_the_pod_has_is_what_must_be_available() {
        let (mut offer, mut here) = (offer(), here());
        check(&offer, &here).unwrap();
        (offer.pod.hugepages, offer.vm.hugepages) = (true, true);
        here.huge_available = Bytes::mib(510);
        let refused = check(&offer, &here).unwrap_err();
        assert_eq!(refused.code, RefuseCode::Memory);
        for word in ["b has", "510", "vm.nr_hugepages"] {
            assert!(refused.reason.contains(word), "{}", refused.reason);
        }
        here.huge_available = Bytes::mib(512);
        here.memory_available = Bytes::mib(100);
        check(&offer, &here).unwrap();
        (offer.pod.hugepages, offer.vm.hugepages) = (false, false);
        assert_eq!(check(&offer, &here).unwrap_err().code, RefuseCode::Memory);
    }

    #[test]
    fn disks_need_as_much_room_as_they_hold_and_not_their_size() {
        let (mut offer, here) = (offer(), here());
        let disk = |size: u64, allocated: u64| DiskOffer {
            name: "root".to_owned(),
            size: size << 20,
            allocated: allocated << 20,
        };
        let set = |offer: &mut Offer, disks: Vec<DiskOffer>| {
            let vm = |disk: &DiskOffer| WritableDisk {
                serial: "w0".to_owned(),
                name: disk.name.clone(),
                size: Bytes(disk.size),
                shared: None,
            };
            offer.vm.writable = disks.iter().map(vm).collect();
            offer.disks = disks;
        };
        set(&mut offer, vec![disk(1 << 10, 4), disk(1 << 10, 6)]);
        check(&offer, &here).unwrap();
        offer.vm.writable.pop();
        assert!(check(&offer, &here).is_err(), "not the VM's");
        let three = [disk(1 << 10, 4), disk(1 << 10, 6), disk(1 << 10, 1)];
        set(&mut offer, three.into());
        let refused = check(&offer, &here).unwrap_err();
        assert_eq!(refused.code, RefuseCode::Disk);
        for word in ["hold 11", "b has 10", "free some"] {
            assert!(refused.reason.contains(word), "{}", refused.reason);
        }
        // Sums that wrap, and sizes that are none.
        for bad in [disk(1, u64::MAX >> 20), disk(0, 0), disk(1 << 40, 0)] {
            set(&mut offer, vec![bad.clone(), bad]);
            assert!(check(&offer, &here).is_err(), "{:?}", offer.disks);
        }
    }

    #[test]
    fn a_vm_of_huge_pages_for_a_pod_without_is_refused() {
        let mut offer = offer();
        offer.vm.hugepages = true;
        let here = Facts {
            huge_available: Bytes::mib(512),
            ..here()
        };
        assert!(check(&offer, &here).is_err());
    }
}
