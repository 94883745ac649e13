//! Paths of archive entries, taken apart before the kernel sees them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::tar::shown;

/// Longest path, in bytes, as the kernel has it (PATH_MAX in limits.h, with the NUL).
const PATH_MAX: usize = 4096;

/// Longest name, in bytes (NAME_MAX in limits.h; EROFS_NAME_LEN is the same).
const NAME_MAX: usize = 255;

/// What is wrong with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadPath(pub(super) &'static str);

/// A path below the root: `name` is missing for the root itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Split {
    pub(super) parent: PathBuf,
    pub(super) name: Option<OsString>,
}

/// Splits a path into its parent and its last component. A `/` at the start, and every `.`, mean nothing: the
/// path starts at the image's root anyhow. A `..` is refused: no tool writes one.
pub(super) fn split(path: &[u8]) -> Result<Split, BadPath> {
    if path.is_empty() {
        return Err(BadPath("its path is empty"));
    }
    if path.len() >= PATH_MAX {
        return Err(BadPath("its path is longer than 4095 bytes"));
    }
    if path.contains(&0) {
        return Err(BadPath("its path has a NUL byte in it"));
    }
    let mut parent = PathBuf::new();
    let mut name: Option<OsString> = None;
    for component in path.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => continue,
            b".." => return Err(BadPath("its path has `..` in it")),
            _ if component.len() > NAME_MAX => {
                return Err(BadPath("a name in its path is longer than 255 bytes"));
            }
            _ => {}
        }
        if let Some(directory) = name.replace(OsString::from_vec(component.to_vec())) {
            parent.push(directory);
        }
    }
    Ok(Split { parent, name })
}

/// A path for a message.
pub(super) fn display(path: &OsStr) -> String {
    shown(path.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(path: &str) -> (String, Option<String>) {
        let split = split(path.as_bytes()).unwrap();
        let name = split.name.map(|name| name.into_string().unwrap());
        (split.parent.to_str().unwrap().to_owned(), name)
    }

    #[test]
    fn paths_start_at_the_root() {
        let name = |text: &str| Some(text.to_owned());
        assert_eq!(parts("a"), (String::new(), name("a")));
        assert_eq!(parts("./a/b/"), ("a".into(), name("b")));
        assert_eq!(parts("/etc//./passwd"), ("etc".into(), name("passwd")));
        assert_eq!(parts("./"), (String::new(), None));
        assert_eq!(parts("/"), (String::new(), None));
    }

    #[test]
    fn hostile_paths_are_refused() {
        for path in ["", "..", "a/../b", "../etc/passwd", "/..", "a\0b", "a/.."] {
            assert!(split(path.as_bytes()).is_err(), "{path:?}");
        }
        assert!(split(&[b'a'; 256]).is_err());
        assert!(split(b"a/".repeat(2048).as_slice()).is_err());
    }
}
