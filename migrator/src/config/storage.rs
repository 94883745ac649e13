//! Where volumes can be beside the node itself.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use super::NodeName;

/// The class of what is on the node itself.
pub const LOCAL: &str = "local";

/// What the node knows of shared storage.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Storage {
    /// The classes by name, which must mean the same on every node that has them. `local` is always there.
    pub classes: BTreeMap<String, StorageClass>,
}

/// A place that several nodes see.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(
    deny_unknown_fields,
    tag = "driver",
    rename_all = "lowercase",
    rename_all_fields = "snake_case"
)]
pub enum StorageClass {
    /// A folder of a mounted file system, such as NFS.
    File {
        /// The folder.
        path: PathBuf,
    },
    /// A pool of a Ceph cluster, through QEMU's own driver.
    Rbd {
        /// The pool.
        pool: String,
        /// Addresses of monitors, with ports if they are not the usual ones.
        monitors: Vec<String>,
        /// Whose key it is, without `client.`.
        user: String,
        /// The file with the key (base64, as `ceph auth get-key` prints it), which only its owner may read.
        key_file: PathBuf,
    },
}

impl Storage {
    pub(super) fn files_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        self.classes.values_mut().map(|class| match class {
            StorageClass::File { path } => path,
            StorageClass::Rbd { key_file, .. } => key_file,
        })
    }

    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        let wrong = |problem: String| Err(("storage.classes", problem));
        for (name, class) in &self.classes {
            if name == LOCAL {
                return wrong(
                    "names `local`, which is the node's own state_dir: choose another name"
                        .to_owned(),
                );
            }
            if name.parse::<NodeName>().is_err() {
                return wrong(format!(
                    "has `{name}`: use at most 63 of a-z, 0-9 and -, not at either end"
                ));
            }
            let StorageClass::Rbd {
                pool,
                monitors,
                user,
                ..
            } = class
            else {
                continue;
            };
            // What librados takes for a list, an option or a path is no name.
            let word = |text: &str| {
                !text.is_empty()
                    && !text.starts_with('-')
                    && text
                        .bytes()
                        .all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(&c))
            };
            if !word(pool) || !word(user) {
                return wrong(format!(
                    "has `{name}`: pool and user are made of letters, digits, `-`, `_` and `.`"
                ));
            }
            let address = |text: &String| {
                !text.is_empty()
                    && text
                        .bytes()
                        .all(|c| c.is_ascii_alphanumeric() || b"-.:[]/".contains(&c))
            };
            if monitors.is_empty() || !monitors.iter().all(address) {
                return wrong(format!(
                    "has `{name}`: list its monitors, such as [10.0.0.1, \"10.0.0.2:3300\"]"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(yaml: &str) -> Result<Storage, String> {
        let storage: Storage = serde_yaml_ng::from_str(yaml).map_err(|e| e.to_string())?;
        storage
            .check()
            .map_err(|(key, why)| format!("{key} {why}"))?;
        Ok(storage)
    }

    #[test]
    fn classes_of_both_drivers_are_read() {
        let storage = parse(
            "classes:
  shared: { driver: file, path: /mnt/nfs/migrator }
  ceph: { driver: rbd, pool: pods, monitors: ['10.0.0.1:3300', '[fd77::1]:3300'], user: migrator, key_file: ceph.key }",
        )
        .unwrap();
        assert_eq!(storage.classes.len(), 2);
        let StorageClass::Rbd { pool, monitors, .. } = &storage.classes["ceph"] else {
            panic!("{storage:?}");
        };
        assert_eq!((pool.as_str(), monitors.len()), ("pods", 2));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let rbd = |what: &str| {
            let all = "driver: rbd, pool: p, monitors: [m], user: u, key_file: k";
            format!(
                "classes: {{ c: {{ {} }} }}",
                all.replace(
                    what.split('=').next().unwrap(),
                    what.split('=').nth(1).unwrap()
                )
            )
        };
        for (yaml, word) in [
            (
                "classes: { local: { driver: file, path: /m } }".to_owned(),
                "local",
            ),
            (
                "classes: { Big: { driver: file, path: /m } }".to_owned(),
                "Big",
            ),
            (
                "classes: { c: { driver: nfs, path: /m } }".to_owned(),
                "nfs",
            ),
            ("classes: { c: { driver: file } }".to_owned(), "path"),
            (rbd("monitors: [m]=monitors: []"), "monitors"),
            (rbd("monitors: [m]=monitors: ['a b']"), "monitors"),
            (rbd("pool: p=pool: -p"), "pool"),
            (rbd("user: u=user: 'a/b'"), "user"),
        ] {
            let error = parse(&yaml).unwrap_err();
            assert!(error.contains(word), "{yaml}: {error}");
        }
    }
}
