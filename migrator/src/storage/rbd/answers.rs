//! What Ceph's programs print, as far as it is used.

use serde::Deserialize;

/// `rbd info --format json`.
#[derive(Debug, Deserialize)]
pub(super) struct Info {
    pub(super) size: u64,
}

/// `rbd du --format json`.
#[derive(Debug, Deserialize)]
pub(super) struct Usage {
    pub(super) images: Vec<ImageUsage>,
}

/// An image, or a snapshot of it.
#[derive(Debug, Deserialize)]
pub(super) struct ImageUsage {
    pub(super) name: String,
    #[serde(default)]
    pub(super) snapshot: Option<String>,
    pub(super) provisioned_size: u64,
    pub(super) used_size: u64,
}

/// `rbd status --format json`.
#[derive(Debug, Deserialize)]
pub(super) struct Status {
    pub(super) watchers: Vec<Watcher>,
}

/// A client that has the image open.
#[derive(Debug, Deserialize)]
pub(super) struct Watcher {
    pub(super) address: String,
}

/// `rbd snap ls --format json`.
#[derive(Debug, Deserialize)]
pub(super) struct Snapshot {
    pub(super) name: String,
    /// `"true"` or `"false"`.
    pub(super) protected: String,
}

/// `rados lock info --format json`.
#[derive(Debug, Deserialize)]
pub(super) struct LockInfo {
    pub(super) lockers: Vec<Locker>,
}

/// Who has a lock.
#[derive(Debug, Deserialize)]
pub(super) struct Locker {
    pub(super) name: String,
    pub(super) cookie: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ceph_16_prints_is_read() {
        let info: Info = serde_json::from_str(r#"{"name":"db","id":"1033d4929516","size":67108864,"objects":16,"order":22,"features":["layering","exclusive-lock"],"parent":{"pool":"pods","image":"migrator.ext4.64","snapshot":"v1"}}"#).unwrap();
        assert_eq!(info.size, 64 << 20);
        let usage: Usage = serde_json::from_str(r#"{"images":[{"name":"db","id":"1033d4929516","provisioned_size":67108864,"used_size":4194304},{"name":"t","snapshot":"v1","provisioned_size":1,"used_size":0}],"total_provisioned_size":2}"#).unwrap();
        assert_eq!(usage.images[0].used_size, 4 << 20);
        assert_eq!(usage.images[1].snapshot.as_deref(), Some("v1"));
        let status: Status = serde_json::from_str(
            r#"{"watchers":[{"address":"127.0.0.1:0/244093450","client":4170,"cookie":94}]}"#,
        )
        .unwrap();
        assert_eq!(status.watchers[0].address, "127.0.0.1:0/244093450");
        let lock: LockInfo = serde_json::from_str(r#"{"name":"claim","type":"exclusive","tag":"","lockers":[{"name":"client.4170","cookie":"x","description":"","expiration":"2026-11-26T12:15:29.203105+0000","addr":"127.0.0.1:0/244093450"}]}"#).unwrap();
        assert_eq!(
            (
                lock.lockers[0].name.as_str(),
                lock.lockers[0].cookie.as_str()
            ),
            ("client.4170", "x")
        );
        let snapshots: Vec<Snapshot> = serde_json::from_str(
            r#"[{"id":4,"name":"v1","size":67108864,"protected":"true","timestamp":"Thu"}]"#,
        )
        .unwrap();
        assert!(snapshots[0].protected == "true" && snapshots[0].name == "v1");
    }
}
