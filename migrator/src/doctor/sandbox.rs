//! Probes of network and mounts, in namespaces that end with them.

use std::io;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::{LinkBridge, LinkVeth, LinkVxlan};

use super::{Check, missing, sys, tried};

/// Runs on a thread of its own, whose namespaces nothing else sees.
pub(super) fn checks() -> Vec<Check> {
    match std::thread::Builder::new()
        .name("doctor".to_owned())
        .spawn(inside)
        .map(std::thread::JoinHandle::join)
    {
        Ok(Ok(checks)) => checks,
        Ok(Err(_)) => vec![sandbox("the probe panicked".to_owned())],
        Err(error) => vec![sandbox(error.to_string())],
    }
}

fn sandbox(why: String) -> Check {
    missing(
        "namespaces",
        true,
        "trying network features without touching the machine's network",
        why,
        "run as root on a kernel with CONFIG_NET_NS",
    )
}

fn inside() -> Vec<Check> {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS) {
        return vec![sandbox(error.to_string())];
    }
    // The loopback device is the first of every network namespace (include/net/net_namespace.h).
    const LOOPBACK: u32 = 1;
    vec![
        tried(
            "tap",
            "guests' network devices",
            sys::tap(),
            "made one with a virtio-net header",
            "a kernel with CONFIG_TUN, and the device node /dev/net/tun",
        ),
        tried(
            "tcx",
            "the gate that holds and forwards packets during the switch",
            sys::tcx(LOOPBACK),
            "loaded and attached a program",
            "Linux 6.6 or later with CONFIG_BPF_SYSCALL and CONFIG_NET_XGRESS; CAP_BPF and CAP_NET_ADMIN",
        ),
        tried(
            "bpffs",
            "keeping the gate in place while the service restarts",
            bpffs(),
            "mounted one",
            "a kernel with CONFIG_BPF_SYSCALL, and CAP_SYS_ADMIN",
        ),
        tried(
            "packet_socket",
            "injecting packets into guests",
            sys::packet_socket(),
            "with virtio-net headers",
            "a kernel with CONFIG_PACKET, and CAP_NET_RAW",
        ),
        tried(
            "bridge",
            "the pods' switch",
            link(LinkBridge::new("probe-br").build()),
            "made one",
            "a kernel with CONFIG_BRIDGE (modprobe bridge)",
        ),
        Check {
            required: false,
            ..tried(
                "vxlan",
                "a tunnel for late packets of departed pods; without one the service relays them",
                link(vxlan()),
                "made one that takes the way of each packet from a program",
                "a kernel with CONFIG_VXLAN (modprobe vxlan)",
            )
        },
        tried(
            "veth",
            "the lab's cables",
            link(LinkVeth::new("probe-v0", "probe-v1").build()),
            "made a pair",
            "a kernel with CONFIG_VETH (modprobe veth)",
        ),
    ]
}

fn vxlan() -> netlink_packet_route::link::LinkMessage {
    LinkVxlan::new("probe-vx", 0)
        .port(4789)
        .collect_metadata(true)
        .build()
}

fn bpffs() -> io::Result<()> {
    // Whatever is mounted here must not spread to where the machine sees it.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )?;
    // This mount namespace is the thread's own, so that any folder serves, and /proc exists everywhere.
    mount(
        Some("bpf"),
        "/proc",
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    )?;
    umount2("/proc", MntFlags::MNT_DETACH)?;
    Ok(())
}

fn link(message: netlink_packet_route::link::LinkMessage) -> io::Result<()> {
    // The socket belongs to the namespace of the thread that opens it: this one.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            let connection = tokio::spawn(connection);
            let result = handle.link().add(message).execute().await;
            connection.abort();
            result.map_err(|error| match error {
                rtnetlink::Error::NetlinkError(message) => message.to_io(),
                other => io::Error::other(other.to_string()),
            })
        })
}
