//! `migrator upgrade POD`.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use vm_runtime::qemu::QemuConfig;
use vm_runtime::units::Bytes;

use super::failure::{Exit, Failure};
use super::{Context, Output, output};
use crate::api::client::encode;
use crate::api::upgrade::UpgradeRequest;
use crate::pods::upgrade::UpgradeReport;

#[derive(Debug, Args)]
pub(super) struct UpgradeArgs {
    /// The pod
    pod: String,
    /// The QEMU to go on in; the one of the node's configuration, as it is installed now, if absent
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// Folder of its shared libraries, if it is unpacked rather than installed
    #[arg(long, value_name = "DIR", requires = "qemu")]
    qemu_lib_dir: Option<PathBuf>,
    /// Folder of its firmware, if it is unpacked rather than installed; may be given several times
    #[arg(long, value_name = "DIR", requires = "qemu")]
    qemu_data_dir: Vec<PathBuf>,
}

impl UpgradeArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        let request = self.request().map_err(|error| {
            Failure::new(Exit::Failed, format!("cannot name the QEMU: {error}"))
        })?;
        let path = format!("/v1/pods/{}/upgrade", encode(&self.pod));
        let report: UpgradeReport = context.client.post(&path, &request).await?;
        match context.output {
            Output::Json => output::json(&report)?,
            Output::Text => output::bytes(summary(&report).as_bytes())?,
        }
        Ok(ExitCode::SUCCESS)
    }

    /// The service's working folder is not the caller's: paths are made absolute here.
    fn request(&self) -> io::Result<UpgradeRequest> {
        let absolute = |path: &Path| std::path::absolute(path);
        let Some(binary) = &self.qemu else {
            return Ok(UpgradeRequest::default());
        };
        let data_dirs = self.qemu_data_dir.iter().map(|dir| absolute(dir));
        Ok(UpgradeRequest {
            qemu: Some(QemuConfig {
                binary: Some(absolute(binary)?),
                lib_dir: self.qemu_lib_dir.as_deref().map(absolute).transpose()?,
                data_dirs: data_dirs.collect::<io::Result<_>>()?,
            }),
        })
    }
}

fn summary(report: &UpgradeReport) -> String {
    let ms = |us: u64| us as f64 / 1000.0;
    let mut out = format!(
        "{} goes on in QEMU {} (was {}), downtime {:.1} ms\n",
        report.pod,
        report.to.version,
        report.from.version,
        ms(report.downtime_us)
    );
    if let Some(bytes) = report.state_bytes {
        out.push_str(&format!("state    {}\n", Bytes(bytes)));
    }
    let steps: Vec<String> = report
        .phases
        .iter()
        .map(|(name, us)| format!("{name} {:.1} ms", ms(*us)))
        .collect();
    out.push_str(&format!("steps    {}\n", steps.join(", ")));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_the_callers_and_none_means_the_nodes_own() {
        let args = |qemu: Option<&str>| UpgradeArgs {
            pod: "web".to_owned(),
            qemu: qemu.map(PathBuf::from),
            qemu_lib_dir: Some("/lib".into()),
            qemu_data_dir: vec!["share".into()],
        };
        assert_eq!(args(None).request().unwrap(), UpgradeRequest { qemu: None });
        let qemu = args(Some("qemu")).request().unwrap().qemu.unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(qemu.binary, Some(here.join("qemu")));
        assert_eq!(qemu.lib_dir, Some("/lib".into()));
        assert_eq!(qemu.data_dirs, [here.join("share")]);
    }
}
