//! What runs in a container: the pod's wish merged with the image's configuration.

use serde::{Deserialize, Serialize};
use vm_runtime::pod::ContainerSpec;

use super::record::ImageConfig;

/// The search path of a process whose image names none: what container runtimes use.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process, ready for the guest agent to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedProcess {
    /// Program and arguments; never empty. The program is looked up in the container's PATH if it has no `/`.
    pub argv: Vec<String>,
    /// The whole environment, each name once.
    pub env: Vec<(String, String)>,
    /// Working directory: absolute, inside the container.
    pub cwd: String,
    /// User as the image wrote it, for messages.
    pub user: String,
    /// Numeric user.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// Why a container cannot be started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// Neither the pod nor the image names a program.
    #[error(
        "container `{container}`: image `{image}` has neither entrypoint nor cmd; set `command` in the pod"
    )]
    NoProgram {
        /// The container's name.
        container: String,
        /// The image's reference.
        image: String,
    },
    /// The working directory does not start at the root.
    #[error("container `{container}`: working directory `{cwd}` is not absolute")]
    RelativeCwd {
        /// The container's name.
        container: String,
        /// The directory.
        cwd: String,
    },
}

/// Merges by the rules of Kubernetes: `command` replaces the entrypoint and drops the image's cmd, `args`
/// replaces the cmd; `$(NAME)` in both, and in `env`, is replaced by the variable if it is known, `$$` is a `$`.
pub fn resolve(
    container: &ContainerSpec,
    config: &ImageConfig,
) -> Result<ResolvedProcess, ResolveError> {
    let mut env: Vec<(String, String)> = Vec::new();
    let set = |env: &mut Vec<(String, String)>, name: &str, value: String| match env
        .iter_mut()
        .find(|(known, _)| known == name)
    {
        Some((_, old)) => *old = value,
        None => env.push((name.to_owned(), value)),
    };
    for (name, value) in &config.env {
        set(&mut env, name, value.clone());
    }
    // Only the pod's own variables are expanded, and only they are known to the expansion: the image's
    // environment is not (Kubernetes: "Define dependent environment variables").
    let mut known: Vec<(String, String)> = Vec::new();
    for (name, value) in &container.env {
        let value = expand(value, &known);
        set(&mut known, name, value.clone());
        set(&mut env, name, value);
    }
    if !env.iter().any(|(name, _)| name == "PATH") {
        env.push(("PATH".to_owned(), DEFAULT_PATH.to_owned()));
    }
    let own = |list: &Vec<String>| list.iter().map(|text| expand(text, &known)).collect();
    let mut argv: Vec<String> = match &container.command {
        Some(command) => own(command),
        None => config.entrypoint.clone(),
    };
    match (&container.args, &container.command) {
        (Some(args), _) => argv.extend::<Vec<String>>(own(args)),
        (None, Some(_)) => {}
        (None, None) => argv.extend(config.cmd.iter().cloned()),
    }
    if argv.first().is_none_or(|program| program.is_empty()) {
        return Err(ResolveError::NoProgram {
            container: container.name.clone(),
            image: container.image.clone(),
        });
    }
    let cwd = match &container.working_dir {
        Some(dir) => dir.clone(),
        None if config.working_dir.is_empty() => "/".to_owned(),
        None => config.working_dir.clone(),
    };
    if !cwd.starts_with('/') {
        return Err(ResolveError::RelativeCwd {
            container: container.name.clone(),
            cwd,
        });
    }
    Ok(ResolvedProcess {
        argv,
        env,
        cwd,
        user: container.user.as_ref().unwrap_or(&config.user).clone(),
        uid: config.uid,
        gid: config.gid,
        groups: config.groups.clone(),
    })
}

/// Replaces `$(NAME)` by its value; an unknown name stays as it is, and so does every other `$`. `$$` becomes `$`.
fn expand(text: &str, known: &[(String, String)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(tail) = rest.strip_prefix("$$") {
            out.push('$');
            rest = tail;
            continue;
        }
        let name = rest
            .strip_prefix("$(")
            .and_then(|tail| tail.split_once(')'));
        if let Some((name, tail)) = name {
            match known.iter().find(|(known, _)| known == name) {
                Some((_, value)) => out.push_str(value),
                None => out.push_str(&rest[..name.len() + 3]),
            }
            rest = tail;
        } else {
            out.push('$');
            rest = &rest[1..];
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|&text| text.to_owned()).collect()
    }

    fn container() -> ContainerSpec {
        ContainerSpec {
            name: "web".into(),
            image: "web:1".into(),
            command: None,
            args: None,
            env: Vec::new(),
            working_dir: None,
            memory_limit: None,
            cpu_limit_milli: None,
            disk_limit: None,
            volume_mounts: Vec::new(),
            user: None,
            settings: Default::default(),
        }
    }

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: strings(&["/entry"]),
            cmd: strings(&["serve", "--fast"]),
            env: vec![("A".into(), "1".into()), ("B".into(), "$(A)".into())],
            working_dir: "/srv".into(),
            user: "web".into(),
            uid: 33,
            gid: 33,
            groups: vec![4],
            stop_signal: String::new(),
        }
    }

    #[test]
    fn the_image_alone_gives_entrypoint_and_cmd() {
        let process = resolve(&container(), &image()).unwrap();
        assert_eq!(process.argv, ["/entry", "serve", "--fast"]);
        assert_eq!(process.cwd, "/srv");
        assert_eq!((process.uid, process.gid), (33, 33));
        assert_eq!(process.env.last().unwrap().0, "PATH");
        // The image's own environment is taken as it is.
        assert_eq!(process.env[1].1, "$(A)");
    }

    #[test]
    fn command_replaces_the_entrypoint_and_drops_cmd() {
        let mut container = container();
        container.command = Some(strings(&["sh", "-c"]));
        assert_eq!(resolve(&container, &image()).unwrap().argv, ["sh", "-c"]);
        container.args = Some(strings(&["date"]));
        let argv = resolve(&container, &image()).unwrap().argv;
        assert_eq!(argv, ["sh", "-c", "date"]);
    }

    #[test]
    fn args_replace_cmd_only() {
        let mut container = container();
        container.args = Some(strings(&["other"]));
        assert_eq!(
            resolve(&container, &image()).unwrap().argv,
            ["/entry", "other"]
        );
    }

    #[test]
    fn the_pod_overrides_and_expands_variables() {
        let mut container = container();
        container.env = vec![
            ("A".into(), "2".into()),
            ("C".into(), "<$(A)>".into()),
            ("D".into(), "$(NOT) $$(A) $A $".into()),
        ];
        container.args = Some(strings(&["$(C)", "$(B)"]));
        let process = resolve(&container, &image()).unwrap();
        assert_eq!(process.argv, ["/entry", "<2>", "$(B)"]);
        assert_eq!(process.env[0], ("A".into(), "2".into()));
        assert_eq!(process.env[3].1, "$(NOT) $(A) $A $");
    }

    #[test]
    fn nothing_to_run_is_an_error() {
        let error = resolve(&container(), &ImageConfig::default()).unwrap_err();
        assert!(error.to_string().contains("set `command`"), "{error}");
    }

    #[test]
    fn a_relative_working_directory_is_an_error() {
        let mut container = container();
        container.working_dir = Some("srv".into());
        assert!(matches!(
            resolve(&container, &image()),
            Err(ResolveError::RelativeCwd { .. })
        ));
    }
}
