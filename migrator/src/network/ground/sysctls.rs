//! The settings of the kernel that make a node a router for its pods, by device where the kernel has it so.
//!
//! Documentation/networking/ip-sysctl.rst. `/proc/sys/net` shows the network namespace of the thread that opens it.

use std::io;
use std::path::{Path, PathBuf};

use crate::network::error::GroundError;

/// Where they are.
const ROOT: &str = "/proc/sys/net";

/// The strict reverse path check: a packet must come by the device that an answer would leave by.
const STRICT: &str = "1";

/// One setting of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    path: PathBuf,
    want: &'static str,
    kind: Kind,
    why: &'static str,
}

/// When a setting is as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// It has the value.
    Is,
    /// It has the value, or the kernel has no such setting for this device.
    IfThere,
    /// It has the value, or, where the kernel has no such setting, the one for all devices has.
    OrElse(PathBuf),
    /// The check is not strict. The larger number counts, of the device's and that of all devices.
    NotStrict(PathBuf),
}

fn of_device(family: &str, device: &str, key: &str) -> PathBuf {
    // A device's name has no slash, and its dots are its own.
    [ROOT, family, "conf", device, key].iter().collect()
}

/// What the kernel needs to pass packets on that come in by a device; IPv6 only if pods have it.
pub fn routing(name: &str, ipv6: bool) -> Vec<Setting> {
    let why = "packets between pods and the world";
    let mut settings = vec![
        Setting {
            path: of_device("ipv4", name, "forwarding"),
            want: "1",
            kind: Kind::Is,
            why,
        },
        // A pod's packets leave by the uplink, and those for it may come by any node, and so by the tunnel.
        Setting {
            path: of_device("ipv4", name, "rp_filter"),
            want: "2",
            kind: Kind::NotStrict(of_device("ipv4", "all", "rp_filter")),
            why: "packets of pods that come by another way than those to them leave",
        },
    ];
    if ipv6 {
        settings.push(Setting {
            path: of_device("ipv6", name, "force_forwarding"),
            want: "1",
            // Linux 6.17. Before, there is one switch for all devices, which makes each of them deaf for router advertisements.
            kind: Kind::OrElse(of_device("ipv6", "all", "forwarding")),
            why,
        });
    }
    settings
}

/// What keeps a guest from changing its node's routes.
pub(super) fn guarded(tap: &str) -> Vec<Setting> {
    let off = |family, key| Setting {
        path: of_device(family, tap, key),
        want: "0",
        kind: Kind::IfThere,
        why: "that no guest changes its node's routes",
    };
    vec![
        off("ipv6", "accept_ra"),
        off("ipv6", "accept_redirects"),
        off("ipv4", "accept_redirects"),
    ]
}

impl Setting {
    /// The file that counts, on this kernel.
    fn file(&self) -> &Path {
        match &self.kind {
            Kind::OrElse(all) if !self.path.exists() => all,
            Kind::OrElse(_) | Kind::Is | Kind::IfThere | Kind::NotStrict(_) => &self.path,
        }
    }

    /// What it is now, if that is not what is wanted.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn differs(&self) -> io::Result<Option<String>> {
        let read =
            |path: &Path| Ok::<_, io::Error>(std::fs::read_to_string(path)?.trim().to_owned());
        let now = match (read(self.file()), &self.kind) {
            (Err(error), Kind::IfThere) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            (Ok(now), Kind::NotStrict(all)) => now.max(read(all)?),
            (now, _) => now?,
        };
        let fits = match &self.kind {
            Kind::NotStrict(_) => now != STRICT,
            Kind::Is | Kind::IfThere | Kind::OrElse(_) => now == self.want,
        };
        Ok((!fits).then_some(now))
    }

    /// What it is for.
    pub fn purpose(&self) -> &'static str {
        self.why
    }

    /// As `sysctl` writes it, with the value that is wanted.
    pub fn wanted(&self) -> String {
        let file = self.file();
        let name = file.strip_prefix("/proc/sys").unwrap_or(file);
        format!("{} = {}", name.display(), self.want)
    }
}

/// Sets what is otherwise; what that was.
pub(super) fn set(settings: &[Setting]) -> Result<Vec<&Setting>, GroundError> {
    let mut changed = Vec::new();
    for setting in settings {
        let refused = |source| GroundError::Setting {
            setting: setting.wanted(),
            why: setting.why,
            source,
        };
        if setting.differs().map_err(refused)?.is_some() {
            std::fs::write(setting.file(), setting.want).map_err(refused)?;
            changed.push(setting);
        }
    }
    Ok(changed)
}
