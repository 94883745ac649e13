//! What a guest is told, from what the user wrote and what the images say.

use std::net::IpAddr;

use guest_agent::protocol::message::{Configuration, Container, Interface};

use crate::pod::{ContainerSpec, PodSpec};

/// What an image's configuration says (OCI image specification, `config`), and where the image is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageSettings {
    /// Serial of the disk that holds it.
    pub disk: String,
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Env`, each `KEY=VALUE` split.
    pub env: Vec<(String, String)>,
    /// `WorkingDir`.
    pub working_dir: String,
    /// `User`.
    pub user: String,
}

/// The guest's configuration of a pod; `image` gives each container's image.
pub fn configuration(
    pod: &PodSpec,
    mut image: impl FnMut(&ContainerSpec) -> ImageSettings,
) -> Configuration {
    let net = &pod.net;
    let v4 = net.ipv4.map(|(a, p)| (IpAddr::V4(a), p));
    let v6 = net.ipv6.map(|(a, p)| (IpAddr::V6(a), p));
    let gateways = net.gateway4.map(IpAddr::V4).into_iter();
    Configuration {
        hostname: pod.name.clone(),
        interfaces: vec![Interface {
            mac: net.mac.0,
            addresses: v4.into_iter().chain(v6).collect(),
            gateways: gateways.chain(net.gateway6.map(IpAddr::V6)).collect(),
            neighbours: Vec::new(),
            mtu: None,
        }],
        dns: Vec::new(),
        containers: pod
            .containers
            .iter()
            .map(|c| container(c, image(c)))
            .collect(),
        sysctls: Vec::new(),
        storage: Vec::new(),
        settings: pod.settings.clone(),
        container_settings: pod.containers.iter().map(|c| c.settings.clone()).collect(),
        output_offsets: Vec::new(),
    }
}

fn container(spec: &ContainerSpec, image: ImageSettings) -> Container {
    let mut env = image.env;
    env.extend(spec.env.iter().cloned());
    Container {
        name: spec.name.clone(),
        disk: image.disk,
        argv: argv(spec, image.entrypoint, image.cmd),
        env,
        working_dir: spec.working_dir.clone().unwrap_or(image.working_dir),
        user: spec.user.clone().unwrap_or(image.user),
        memory_limit: spec.memory_limit.map(|b| b.0),
        cpu_limit_milli: spec.cpu_limit_milli,
    }
}

/// Kubernetes' rule: a command replaces the entrypoint and the image's cmd; args replace the cmd.
fn argv(spec: &ContainerSpec, entrypoint: Vec<String>, cmd: Vec<String>) -> Vec<String> {
    let (mut argv, rest) = match (&spec.command, &spec.args) {
        (Some(command), args) => (command.clone(), args.clone().unwrap_or_default()),
        (None, Some(args)) => (entrypoint, args.clone()),
        (None, None) => (entrypoint, cmd),
    };
    argv.extend(rest);
    argv
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_and_args_replace_what_the_image_says_as_in_kubernetes() {
        let words = |t: &str| t.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let run = |command: Option<&str>, args: Option<&str>| {
            let spec = ContainerSpec {
                name: "c".into(),
                image: "i".into(),
                command: command.map(words),
                args: args.map(words),
                env: vec![],
                working_dir: None,
                memory_limit: None,
                cpu_limit_milli: None,
                disk_limit: None,
                volume_mounts: Vec::new(),
                user: None,
                settings: Default::default(),
            };
            argv(&spec, words("entry"), words("cmd")).join(" ")
        };
        assert_eq!(run(None, None), "entry cmd");
        assert_eq!(run(None, Some("a")), "entry a");
        assert_eq!(run(Some("c"), None), "c");
        assert_eq!(run(Some("c"), Some("a")), "c a");
    }
}
