//! Where the kernel's control groups keep a process, and whether they can limit its threads. Pure.
//!
//! Formats: cgroups(7) for `/proc/PID/cgroup`, proc(5) for `/proc/PID/mountinfo`.

use std::path::{Path, PathBuf};

/// The two versions of control groups; a machine may have both, with a controller in only one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// A hierarchy of the CPU controller alone, or with others; threads go into groups one by one.
    V1,
    /// The one hierarchy; threads go into threaded groups one by one.
    V2,
}

/// The group that a process is in, as a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) version: Version,
    pub(super) dir: PathBuf,
}

/// The folders that may hold groups with a CPU limit, by `/proc/PID/cgroup` and `/proc/self/mountinfo`: that of
/// version 1 first, because where it exists version 2 has no CPU controller.
pub(super) fn places(cgroup: &str, mountinfo: &str) -> Vec<Place> {
    let lines = cgroup.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        Some((controllers, Path::new(path)))
    });
    let mut places: Vec<Place> = lines
        .filter_map(|(controllers, path)| {
            let version = match controllers {
                "" => Version::V2,
                list if list.split(',').any(|one| one == "cpu") => Version::V1,
                _ => return None,
            };
            let dir = mountinfo
                .lines()
                .find_map(|line| mounted(line, version, path))?;
            Some(Place { version, dir })
        })
        .collect();
    places.sort_by_key(|place| place.version == Version::V2);
    places
}

/// The folder of the group `path`, if this line of mountinfo is a mount that shows it.
fn mounted(line: &str, version: Version, path: &Path) -> Option<PathBuf> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (root, point) = (before.next()?, before.next()?);
    let mut after = after.split(' ');
    let (kind, options) = (after.next()?, after.nth(1)?);
    let fits = match version {
        Version::V1 => kind == "cgroup" && options.split(',').any(|one| one == "cpu"),
        Version::V2 => kind == "cgroup2",
    };
    // Escaped names (a blank is \040) are none that anybody mounts control groups at.
    if !fits || point.contains('\\') {
        return None;
    }
    let inside = path.strip_prefix(root).ok()?;
    Some(Path::new(point).join(inside))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYSTEMD: &str =
        "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    const BOTH: &str = "24 20 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
        25 24 0:23 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n\
        26 24 0:24 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
        27 24 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    fn found(cgroup: &str, mountinfo: &str) -> Vec<(Version, String)> {
        let places = places(cgroup, mountinfo);
        let short = |place: &Place| (place.version, place.dir.display().to_string());
        places.iter().map(short).collect()
    }

    #[test]
    fn the_one_hierarchy_is_found() {
        assert_eq!(
            found("0::/system.slice/migrator.service\n", SYSTEMD),
            [(
                Version::V2,
                "/sys/fs/cgroup/system.slice/migrator.service".to_owned()
            )]
        );
    }

    #[test]
    fn the_cpu_controller_of_version_1_comes_first_and_others_do_not_count() {
        let cgroup = "5:cpuset:/one\n0::/two\n3:cpu,cpuacct:/three\n";
        assert_eq!(
            found(cgroup, BOTH),
            [
                (Version::V1, "/sys/fs/cgroup/cpu,cpuacct/three".to_owned()),
                (Version::V2, "/sys/fs/cgroup/unified/two".to_owned())
            ]
        );
    }

    #[test]
    fn a_mount_that_shows_only_a_part_is_looked_through() {
        let part = "29 23 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n";
        assert_eq!(
            found("0::/docker/abc/vm", part),
            [(Version::V2, "/sys/fs/cgroup/vm".to_owned())]
        );
        assert_eq!(found("0::/elsewhere", part), []);
    }

    #[test]
    fn what_makes_no_sense_is_no_place() {
        assert_eq!(found("", SYSTEMD), []);
        assert_eq!(found("0::/a", ""), []);
        assert_eq!(found("x\n1:name=systemd:/a\n", BOTH), []);
        assert_eq!(found("0::/a", "1 2 3 - cgroup2"), []);
    }
}
