//! `user[:group]` of an image, resolved in the image's own /etc/passwd and /etc/group.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};

/// The two files are read up to this many bytes.
const LIMIT: u64 = 4 << 20;

/// Whom a process runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

/// Resolves `user` below the current root.
pub(crate) fn resolve(user: &str) -> Result<Identity> {
    parse(user, &read("/etc/passwd"), &read("/etc/group"))
}

/// The image's file; empty if there is none. Never blocks on what is not a file.
fn read(path: &str) -> String {
    let mut text = Vec::new();
    if let Ok(file) = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        && file.metadata().is_ok_and(|m| m.is_file())
    {
        file.take(LIMIT).read_to_end(&mut text).ok();
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn parse(user: &str, passwd: &str, group: &str) -> Result<Identity> {
    let (user, group_name) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (user, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    let entry = passwd.lines().map(fields).find(|f| {
        f.len() >= 6 && (f[0] == user || (number.is_some() && f[2].parse().ok() == number))
    });
    let (uid, primary, name, home) = match &entry {
        Some(f) => (
            f[2].parse()
                .with_context(|| format!("the user id of `{user}` in /etc/passwd"))?,
            f[3].parse()
                .with_context(|| format!("the group id of `{user}` in /etc/passwd"))?,
            Some(f[0]),
            f[5],
        ),
        None => {
            let uid = number.with_context(|| {
                format!("the image has no user `{user}` in /etc/passwd: name one that it has, or a number")
            })?;
            (uid, 0, None, "/")
        }
    };
    let groups = group.lines().map(fields).filter(|f| f.len() >= 4);
    let gid = match group_name {
        None => primary,
        Some(wanted) => match wanted.parse() {
            Ok(gid) => gid,
            Err(_) => groups
                .clone()
                .find(|f| f[0] == wanted)
                .and_then(|f| f[2].parse().ok())
                .with_context(|| {
                    format!("the image has no group `{wanted}` in /etc/group: name one that it has, or a number")
                })?,
        },
    };
    // With a group of its own in the spec, only that one counts, as in Docker.
    let member = |f: &Vec<&str>| {
        group_name.is_none() && name.is_some_and(|n| f[3].split(',').any(|m| m == n))
    };
    let mut supplementary: Vec<u32> = groups
        .filter(member)
        .filter_map(|f| f[2].parse().ok())
        .filter(|g| *g != gid)
        .collect();
    supplementary.insert(0, gid);
    Ok(Identity {
        uid,
        gid,
        groups: supplementary,
        home: if home.is_empty() { "/" } else { home }.to_owned(),
    })
}

fn fields(line: &str) -> Vec<&str> {
    line.trim_end().split(':').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nredis:x:101:102::/var/lib/redis:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nredis:x:102:\nssl:x:110:redis,www\n";

    fn ids(user: &str) -> (u32, u32, Vec<u32>, String) {
        let id = parse(user, PASSWD, GROUP).expect("resolves");
        (id.uid, id.gid, id.groups, id.home)
    }

    #[test]
    fn names_and_numbers_are_found_with_their_groups_and_home() {
        assert_eq!(ids(""), (0, 0, vec![0], "/root".into()));
        assert_eq!(
            ids("redis"),
            (101, 102, vec![102, 110], "/var/lib/redis".into())
        );
        assert_eq!(
            ids("101"),
            (101, 102, vec![102, 110], "/var/lib/redis".into())
        );
        assert_eq!(
            ids("redis:ssl"),
            (101, 110, vec![110], "/var/lib/redis".into())
        );
        assert_eq!(ids("7:8"), (7, 8, vec![8], "/".into()));
        assert_eq!(ids("7"), (7, 0, vec![0], "/".into()));
    }

    #[test]
    fn an_unknown_name_is_an_error_that_names_it() {
        let error = parse("nobody", PASSWD, GROUP)
            .expect_err("unknown")
            .to_string();
        assert!(error.contains("`nobody`"), "{error}");
        assert!(parse("root:none", PASSWD, GROUP).is_err());
    }
}
