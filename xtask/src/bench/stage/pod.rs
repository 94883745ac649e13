//! The guest that all cases measure: one YAML, for the pod that migrator runs and for the one that QEMU alone runs. Pure.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use vm_runtime::agent_client::{Configuration, ImageSettings, Mount, Storage, configuration};
use vm_runtime::pod::PodSpec;

use super::image;

/// Where the demo's echo and the load listen in a guest.
const ECHO_PORT: u16 = 7000;
const LOAD_PORT: u16 = 7001;

/// Serial of the disk that holds the image.
pub(in crate::bench) const DISK: &str = "img0";
/// Serial of the writable one.
pub(in crate::bench) const WRITABLE: &str = "w0";

/// A guest: who runs it, and how large it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::bench) struct Guest {
    /// The pod's name.
    pub(in crate::bench) name: &'static str,
    /// Its address.
    address: Ipv4Addr,
    /// Guest RAM in MiB.
    pub(in crate::bench) mib: u32,
    /// Its writable disk in MiB, half of which the load's file takes; 0 without one.
    pub(in crate::bench) disk_mib: u32,
}

impl Guest {
    /// The one that migrator runs.
    pub(in crate::bench) fn ours(mib: u32, disk_mib: u32) -> Guest {
        Guest {
            name: "bench",
            address: Ipv4Addr::new(10, 77, 0, 40),
            mib,
            disk_mib,
        }
    }

    /// The one that QEMU alone runs. Beside ours, hence the other name and address.
    pub(in crate::bench) fn peer(mib: u32, disk_mib: u32) -> Guest {
        Guest {
            name: "bench-peer",
            address: Ipv4Addr::new(10, 77, 0, 41),
            mib,
            disk_mib,
        }
    }

    /// What the load fills, writes and touches: a quarter of the RAM, in MiB.
    pub(in crate::bench) fn set_mib(self) -> u32 {
        self.mib / 4
    }

    /// Where the echo answers.
    pub(in crate::bench) fn echo(self) -> SocketAddr {
        (self.address, ECHO_PORT).into()
    }

    /// Where the load is told what to do.
    pub(in crate::bench) fn load(self) -> SocketAddr {
        (self.address, LOAD_PORT).into()
    }

    /// Its pod, for `migrator run`.
    pub(in crate::bench) fn yaml(self) -> String {
        let (file, mounts, volumes) = match self.disk_mib {
            0 => Default::default(),
            mib => (
                format!(", /data/load, \"{}\"", mib / 2),
                "      volumeMounts:\n        - {name: data, mountPath: /data}\n",
                format!("  volumes:\n    - name: data\n      emptyDir: {{sizeLimit: {mib}Mi}}\n"),
            ),
        };
        format!(
            "apiVersion: v1
kind: Pod
metadata:
  name: {name}
  annotations:
    migrator/ipv4: {address}/24
    migrator/vm-memory: {mib}Mi
spec:
  containers:
    - name: load
      image: {image}
      command: [/usr/local/bin/memory-load, \"{LOAD_PORT}\", \"{set}\"{file}]
{mounts}    - name: echo
      image: {image}
      command: [/usr/local/bin/udp-echo]
{volumes}",
            name = self.name,
            address = self.address,
            mib = self.mib,
            image = image::REFERENCE,
            set = self.set_mib(),
        )
    }

    /// The same, parsed, and what the guest's agent is told.
    ///
    /// # Errors
    /// The YAML is not a pod.
    pub(in crate::bench) fn plan(self) -> Result<(PodSpec, Configuration)> {
        let spec = PodSpec::from_yaml(&self.yaml()).context("the benchmarks' own pod is wrong")?;
        let mut told = configuration(&spec, |_| ImageSettings {
            disk: DISK.to_owned(),
            working_dir: "/".to_owned(),
            ..ImageSettings::default()
        });
        if self.disk_mib > 0 {
            told.storage = vec![Storage {
                container: "load".to_owned(),
                layer: None,
                mounts: vec![Mount {
                    disk: WRITABLE.to_owned(),
                    path: "/data".to_owned(),
                    read_only: false,
                }],
            }];
        }
        Ok((spec, told))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_guests_are_the_same_but_for_name_and_address() {
        let (ours, told) = Guest::ours(512, 0).plan().unwrap();
        let (peer, _) = Guest::peer(512, 0).plan().unwrap();
        assert_eq!((ours.memory, ours.vcpus), (peer.memory, peer.vcpus));
        assert_ne!(ours.net.mac, peer.net.mac);
        assert_eq!(ours.containers, peer.containers);
        let load = &told.containers[0];
        assert_eq!(load.argv, ["/usr/local/bin/memory-load", "7001", "128"]);
        assert_eq!(load.disk, DISK);
    }

    #[test]
    fn a_guest_with_a_disk_has_the_load_write_to_half_of_it() {
        let (_, told) = Guest::peer(512, 256).plan().unwrap();
        let words = [
            "/usr/local/bin/memory-load",
            "7001",
            "128",
            "/data/load",
            "128",
        ];
        assert_eq!(told.containers[0].argv, words);
        assert_eq!(told.storage[0].mounts[0].disk, WRITABLE);
    }
}
