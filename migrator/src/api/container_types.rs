//! Containers in the API's JSON.

use serde::{Deserialize, Serialize};

/// Where a container is in its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum ContainerState {
    /// Not started yet.
    Waiting,
    /// Its first process runs.
    Running,
    /// Its first process ended.
    Exited {
        /// Exit code; 128 + signal if a signal ended it.
        code: i32,
    },
}

/// One container of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Its name.
    pub name: String,
    /// The image's reference.
    pub image: String,
    /// Where it is.
    #[serde(flatten)]
    pub state: ContainerState,
    /// How it fares beyond that.
    #[serde(flatten)]
    pub condition: ContainerCondition,
}

/// How a container fares. Absent from what the guests of earlier builds tell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerCondition {
    /// How often it was started again.
    #[serde(skip_serializing_if = "is_zero")]
    pub restarts: u32,
    /// It runs, and its readiness probe, if it has one, succeeds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<bool>,
    /// Why it ended the last time: `Completed`, `Error`, `OOMKilled`, `Unhealthy`, `StartError`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its exit code of then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_code: Option<i32>,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}
