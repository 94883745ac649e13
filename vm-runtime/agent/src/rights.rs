//! What a container's processes may do, and as whom.

use anyhow::{Context, Result, bail};
use guest_agent::protocol::settings::{ContainerSettings, PodSettings};
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use serde::{Deserialize, Serialize};

use crate::sys;
use crate::users::{self, Identity};

/// As the pod has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Rights {
    capabilities: u64,
    no_new_privileges: bool,
    non_root: bool,
    /// Beside those of the image.
    groups: Vec<u32>,
}

impl Rights {
    pub(crate) fn new(pod: &PodSettings, container: &ContainerSettings) -> Self {
        let groups = container.groups.iter().copied().chain(pod.fs_group);
        Self {
            capabilities: container.capabilities(),
            no_new_privileges: container.no_new_privileges,
            non_root: container.non_root,
            groups: groups.collect(),
        }
    }

    /// Who `user` is below the current root.
    pub(crate) fn identity(&self, user: &str) -> Result<Identity> {
        let mut identity = users::resolve(user)?;
        if self.non_root && identity.uid == 0 {
            bail!("runAsNonRoot is set, and it would run as root: set runAsUser to another user");
        }
        for group in &self.groups {
            if !identity.groups.contains(group) {
                identity.groups.push(*group);
            }
        }
        Ok(identity)
    }

    /// Makes this process that user, with these rights and no others.
    pub(crate) fn take(&self, identity: &Identity) -> Result<()> {
        sys::bound_capabilities(self.capabilities).context("dropping capabilities")?;
        let groups: Vec<Gid> = identity.groups.iter().copied().map(Gid::from_raw).collect();
        setgroups(&groups).context("setting the groups")?;
        setgid(Gid::from_raw(identity.gid)).context("setting the group")?;
        setuid(Uid::from_raw(identity.uid)).context("setting the user")?;
        if identity.uid == 0 {
            sys::limit_capabilities(self.capabilities).context("dropping capabilities")?;
        }
        if self.no_new_privileges {
            sys::no_new_privileges().context("giving up new privileges")?;
        }
        Ok(())
    }
}
