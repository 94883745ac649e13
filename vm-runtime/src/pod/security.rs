//! `securityContext`, of a pod and of a container: users, groups, capabilities.

use guest_agent::protocol::settings::ContainerSettings;

use super::PodError;
use super::yaml::{Fields, Node, invalid};

/// Names of capabilities without `CAP_`, by number (linux/capability.h).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Whom processes run as, where a pod says so.
#[derive(Clone, Debug, Default)]
pub(super) struct User {
    uid: Option<u32>,
    gid: Option<u32>,
    non_root: Option<bool>,
}

impl User {
    fn read(fields: &mut Fields<'_>) -> Result<Self, PodError> {
        Ok(Self {
            uid: id(fields.get("runAsUser"))?,
            gid: id(fields.get("runAsGroup"))?,
            non_root: match fields.get("runAsNonRoot") {
                Some(node) => Some(node.truth()?),
                None => None,
            },
        })
    }

    /// As an image's configuration would write it; `None`: the image decides.
    fn text(&self, path: &str) -> Result<Option<String>, PodError> {
        match (self.uid, self.gid) {
            (None, None) => Ok(None),
            (Some(uid), None) => Ok(Some(uid.to_string())),
            (Some(uid), Some(gid)) => Ok(Some(format!("{uid}:{gid}"))),
            (None, Some(_)) => invalid(path, "runAsGroup needs runAsUser beside it"),
        }
    }
}

/// A pod's `securityContext`.
#[derive(Clone, Debug, Default)]
pub(super) struct PodSecurity {
    user: User,
    groups: Vec<u32>,
    pub(super) fs_group: Option<u32>,
}

pub(super) fn pod(node: Option<Node<'_>>) -> Result<PodSecurity, PodError> {
    let Some(node) = node else {
        return Ok(PodSecurity::default());
    };
    let mut fields = node.fields()?;
    let user = User::read(&mut fields)?;
    let groups = match fields.get("supplementalGroups") {
        Some(node) => node.list()?.iter().map(number).collect::<Result<_, _>>()?,
        None => Vec::new(),
    };
    let fs_group = id(fields.get("fsGroup"))?;
    fields.finish()?;
    Ok(PodSecurity {
        user,
        groups,
        fs_group,
    })
}

/// A container's `securityContext`, with what its pod's says where it says nothing; whom it runs as.
pub(super) fn container(
    node: Option<Node<'_>>,
    pod: &PodSecurity,
    settings: &mut ContainerSettings,
) -> Result<Option<String>, PodError> {
    settings.groups.clone_from(&pod.groups);
    settings.non_root = pod.user.non_root.unwrap_or(false);
    let Some(node) = node else {
        return pod.user.text("spec.securityContext");
    };
    let path = node.path.clone();
    let mut fields = node.fields()?;
    let own = User::read(&mut fields)?;
    let mut truth = |key| match fields.get(key) {
        Some(node) => node.truth(),
        None => Ok(key == "allowPrivilegeEscalation"),
    };
    settings.read_only_root = truth("readOnlyRootFilesystem")?;
    settings.no_new_privileges = !truth("allowPrivilegeEscalation")?;
    let privileged = truth("privileged")?;
    if let Some(node) = fields.get("capabilities") {
        let mut lists = node.fields()?;
        settings.add_capabilities = capabilities(lists.get("add"))?;
        settings.drop_capabilities = capabilities(lists.get("drop"))?;
        lists.finish()?;
    }
    fields.finish()?;
    if privileged {
        return Err(PodError::Unsupported {
            path: format!("{path}.privileged"),
            hint: "a container has no devices of its node: add the capabilities that it needs, or [ALL]".to_owned(),
        });
    }
    settings.non_root = own.non_root.unwrap_or(settings.non_root);
    let user = User {
        uid: own.uid.or(pod.user.uid),
        gid: own.gid.or(pod.user.gid),
        non_root: None,
    };
    if settings.non_root && user.uid == Some(0) {
        return invalid(&format!("{path}.runAsNonRoot"), "runAsUser is 0 beside it");
    }
    user.text(&path)
}

fn id(node: Option<Node<'_>>) -> Result<Option<u32>, PodError> {
    node.as_ref().map(number).transpose()
}

/// The number of a user or a group. The last is what chown(2) takes for "leave it".
fn number(node: &Node<'_>) -> Result<u32, PodError> {
    node.number(0, u32::MAX - 1)
}

fn capabilities(node: Option<Node<'_>>) -> Result<u64, PodError> {
    let Some(node) = node else { return Ok(0) };
    let mut bits = 0;
    for item in node.list()? {
        let name = item.text()?.to_ascii_uppercase();
        let name = name.strip_prefix("CAP_").unwrap_or(&name);
        bits |= match CAPABILITIES.iter().position(|known| *known == name) {
            Some(number) => 1 << number,
            None if name == "ALL" => (1 << CAPABILITIES.len()) - 1,
            None => {
                let problem = format!("`{name}` is not a capability, such as NET_ADMIN, or ALL");
                return invalid(&item.path, problem);
            }
        };
    }
    Ok(bits)
}
