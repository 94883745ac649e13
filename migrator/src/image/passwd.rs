//! The image's user, looked up in the image's own files.

/// Why the user has no number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// Not in /etc/passwd.
    #[error("the image runs as user `{0}`, but its /etc/passwd has no such user")]
    NoUser(String),
    /// Not in /etc/group.
    #[error("the image runs as group `{0}`, but its /etc/group has no such group")]
    NoGroup(String),
}

/// A user in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
}

/// Resolves `USER`, `UID`, `USER:GROUP`, `UID:GID` and their mixtures (OCI image-spec, config.md, "User").
/// Supplementary groups are those that /etc/group lists the user in, unless a group is named.
pub(super) fn resolve(spec: &str, passwd: &str, group: &str) -> Result<User, UserError> {
    if spec.is_empty() {
        return Ok(User::default());
    }
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (spec, None),
    };
    let number: Option<u32> = user.parse().ok();
    let entry = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid: u32 = fields.nth(1)?.parse().ok()?;
        let gid: u32 = fields.next()?.parse().ok()?;
        (name == user || Some(uid) == number).then_some((name, uid, gid))
    });
    let (name, uid, gid) = match (entry, number) {
        (Some((name, uid, gid)), _) => (Some(name), uid, gid),
        (None, Some(uid)) => (None, uid, 0),
        (None, None) => return Err(UserError::NoUser(user.to_owned())),
    };
    let groups = || {
        group.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let group = fields.next()?;
            let gid: u32 = fields.nth(1)?.parse().ok()?;
            Some((group, gid, fields.next().unwrap_or("")))
        })
    };
    match wanted_group {
        Some(wanted) => {
            let known = groups()
                .find(|(name, _, _)| *name == wanted)
                .map(|(_, gid, _)| gid);
            let gid = known
                .or_else(|| wanted.parse().ok())
                .ok_or_else(|| UserError::NoGroup(wanted.to_owned()))?;
            Ok(User {
                uid,
                gid,
                groups: Vec::new(),
            })
        }
        None => Ok(User {
            uid,
            gid,
            groups: groups()
                .filter(|(_, _, members)| members.split(',').any(|member| Some(member) == name))
                .map(|(_, gid, _)| gid)
                .collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nredis:x:101:102::/var/lib/redis:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nredis:x:102:\ntls:x:105:nginx,redis\n";

    #[test]
    fn names_and_numbers_are_resolved() {
        let user = |spec| resolve(spec, PASSWD, GROUP).unwrap();
        assert_eq!(user(""), User::default());
        let redis = User {
            uid: 101,
            gid: 102,
            groups: vec![105],
        };
        assert_eq!(user("redis"), redis);
        assert_eq!(user("101"), redis);
        assert_eq!(
            user("redis:tls"),
            User {
                uid: 101,
                gid: 105,
                groups: vec![]
            }
        );
        assert_eq!(
            user("7:8"),
            User {
                uid: 7,
                gid: 8,
                groups: vec![]
            }
        );
        assert_eq!(
            user("7"),
            User {
                uid: 7,
                gid: 0,
                groups: vec![]
            }
        );
    }

    #[test]
    fn unknown_names_are_errors() {
        assert_eq!(
            resolve("web", PASSWD, GROUP),
            Err(UserError::NoUser("web".into()))
        );
        assert_eq!(
            resolve("0:web", PASSWD, GROUP),
            Err(UserError::NoGroup("web".into()))
        );
    }
}
