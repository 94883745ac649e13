//! What a verb fails with, and the exit code that says so.

use std::io;
use std::process::ExitCode;

use crate::api::client::ClientError;
use crate::api::error::{ApiError, chain};
use crate::api::types::ErrorCode;

/// Exit codes, as `docs/cli.md` and `--help` list them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// The verb failed.
    Failed,
    /// No such pod, container, image, migration or node.
    NotFound,
    /// In use, taken, or not possible now.
    Refused,
    /// No service answers.
    Unreachable,
    /// `exec` itself failed, not the command.
    Exec,
}

impl Exit {
    fn code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::NotFound => 3,
            Self::Refused => 4,
            Self::Unreachable => 5,
            Self::Exec => 125,
        }
    }
}

/// A failed verb.
#[derive(Debug)]
pub(super) struct Failure {
    exit: Exit,
    message: String,
    hint: Option<String>,
    /// The reader of our output went away: nothing to complain about.
    quiet: bool,
}

impl Failure {
    pub(super) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            hint: None,
            quiet: false,
        }
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same failure with another exit code.
    pub(super) fn with_exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    /// Prints it to stderr.
    pub(super) fn report(self) -> ExitCode {
        if !self.quiet {
            eprintln!("migrator: {}", self.message);
            if let Some(hint) = self.hint {
                eprintln!("hint: {hint}");
            }
        }
        ExitCode::from(self.exit.code())
    }
}

impl From<ApiError> for Failure {
    fn from(ApiError(error): ApiError) -> Self {
        let exit = match error.code {
            ErrorCode::NotFound => Exit::NotFound,
            ErrorCode::Conflict | ErrorCode::Busy | ErrorCode::Refused => Exit::Refused,
            ErrorCode::Invalid
            | ErrorCode::Exhausted
            | ErrorCode::Registry
            | ErrorCode::Timeout
            | ErrorCode::Internal => Exit::Failed,
            ErrorCode::Unavailable => Exit::Unreachable,
        };
        Self {
            exit,
            message: error.message,
            hint: error.hint,
            quiet: false,
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Api(error) => error.into(),
            ClientError::Unreachable { .. } => Self::new(Exit::Unreachable, chain(&error)).hint(
                "is `migrator node` running, and is its socket named by --api-socket or $MIGRATOR_API?",
            ),
            ClientError::Broken(_) => Self::new(Exit::Unreachable, chain(&error))
                .hint("the service may have been stopped: see its log"),
            ClientError::Answer(_) => Self::new(Exit::Failed, chain(&error))
                .hint("are the service and this program of the same version?"),
        }
    }
}

/// Failures of our own output.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self {
            exit: Exit::Failed,
            quiet: error.kind() == io::ErrorKind::BrokenPipe,
            message: format!("cannot write the output: {error}"),
            hint: None,
        }
    }
}
