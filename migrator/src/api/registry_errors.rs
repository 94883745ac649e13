//! Failures of registries and of the image store, as the API tells them.

use super::error::ApiError;
use super::types::ErrorCode;
use crate::image::{ContentError, ImportError, KeptError, SaveError, StoreError};
use crate::registry::chunks::{OpenError, PackError};
use crate::registry::{FetchError, PullError, PushError, RequestError, SetupError};

pub(super) fn of_pull(error: &PullError) -> ApiError {
    let hint = error.request().and_then(RequestError::hint);
    with_hint(ApiError::caused(code_of_pull(error), error), hint)
}

pub(super) fn of_push(error: &PushError) -> ApiError {
    let (code, hint) = match error {
        PushError::Kept(error) => return of_kept(error),
        PushError::Request { source, .. } => (code_of_request(source), source.hint()),
        PushError::Subject { source, .. } => (code_of_fetch(source), None),
        PushError::Pack(PackError::Store(error)) => return of_store(error),
        PushError::Pack(PackError::Write(error))
            if error.kind() == std::io::ErrorKind::StorageFull =>
        {
            (ErrorCode::Exhausted, None)
        }
        PushError::Pack(PackError::Write(_)) => (ErrorCode::Internal, None),
        PushError::Pinned(..) => (ErrorCode::Invalid, None),
        PushError::Setup(error) => (code_of_setup(error), None),
        PushError::Content(error) => (code_of_content(error), None),
        PushError::Read { .. } | PushError::Task(_) => (ErrorCode::Internal, None),
        PushError::Ended => (ErrorCode::Unavailable, None),
    };
    with_hint(ApiError::caused(code, error), hint)
}

pub(super) fn of_save(error: &SaveError) -> ApiError {
    let code = match error {
        SaveError::Kept(error) => return of_kept(error),
        SaveError::Exists(_) => ErrorCode::Conflict,
        SaveError::Write { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
            ErrorCode::Exhausted
        }
        SaveError::Write { .. } => ErrorCode::Invalid,
        SaveError::Damaged { .. } => ErrorCode::Internal,
    };
    ApiError::caused(code, error)
}

fn of_kept(error: &KeptError) -> ApiError {
    match error {
        KeptError::Store(error) => of_store(error),
        KeptError::NotKept(_) => ApiError::caused(ErrorCode::Refused, error).hint(
            "pull it with `--keep-layers`, or import it once more with `--keep-layers`; `registries.keep_layers: true` in the \
             node's configuration does so always",
        ),
        KeptError::Content(_) => ApiError::caused(ErrorCode::Internal, error),
    }
}

/// A failure of the store.
pub(super) fn of_store(error: &StoreError) -> ApiError {
    let code = match error {
        StoreError::NotFound(_) => ErrorCode::NotFound,
        StoreError::InUse(_) | StoreError::Ambiguous(_) => ErrorCode::Conflict,
        StoreError::Name(_) => ErrorCode::Invalid,
        StoreError::Io { .. }
        | StoreError::Locked { .. }
        | StoreError::NoChunk { .. }
        | StoreError::Damaged { .. }
        | StoreError::Chunk(_)
        | StoreError::Misfit { .. }
        | StoreError::Record(_) => ErrorCode::Internal,
    };
    ApiError::caused(code, error)
}

fn with_hint(error: ApiError, hint: Option<&'static str>) -> ApiError {
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

fn code_of_request(error: &RequestError) -> ErrorCode {
    match error {
        RequestError::Missing { .. } => ErrorCode::NotFound,
        RequestError::Unauthorized { .. } | RequestError::Forbidden { .. } => ErrorCode::Refused,
        RequestError::NoHost { .. }
        | RequestError::Unreachable { .. }
        | RequestError::Untrusted { .. }
        | RequestError::NoTls { .. }
        | RequestError::Busy { .. }
        | RequestError::Status { .. }
        | RequestError::Broken { .. }
        | RequestError::Short { .. }
        | RequestError::Nonsense { .. } => ErrorCode::Registry,
    }
}

fn code_of_fetch(error: &FetchError) -> ErrorCode {
    match error {
        FetchError::Request(error) => code_of_request(error),
        FetchError::OtherManifest { .. } | FetchError::Incomplete { .. } => ErrorCode::Registry,
        FetchError::Content(error) => code_of_content(error),
        FetchError::Task(_) => ErrorCode::Internal,
    }
}

/// The class of a pull's failure.
pub(crate) fn code_of_pull(error: &PullError) -> ErrorCode {
    match error {
        PullError::Fetch { source, .. } => code_of_fetch(source),
        PullError::Chunks { source, .. } => match source {
            OpenError::Fetch(source) => code_of_fetch(source),
            OpenError::Artifact(_) | OpenError::Index { .. } => ErrorCode::Registry,
        },
        PullError::Content(error) => code_of_content(error),
        PullError::Import { source, .. } if matches!(**source, ImportError::DiskFull { .. }) => {
            ErrorCode::Exhausted
        }
        PullError::Setup(error) => code_of_setup(error),
        PullError::Name(_) | PullError::Manifest { .. } | PullError::Import { .. } => {
            ErrorCode::Invalid
        }
        PullError::Store(_) | PullError::Task(_) => ErrorCode::Internal,
        PullError::Ended => ErrorCode::Unavailable,
    }
}

fn code_of_setup(error: &SetupError) -> ErrorCode {
    match error {
        SetupError::ReadCredentials { .. }
        | SetupError::Credentials { .. }
        | SetupError::Client(_) => ErrorCode::Invalid,
        SetupError::Task(_) => ErrorCode::Internal,
    }
}

fn code_of_content(error: &ContentError) -> ErrorCode {
    match error {
        ContentError::Tampered { .. } | ContentError::TooLong { .. } => ErrorCode::Registry,
        ContentError::DiskFull { .. } => ErrorCode::Exhausted,
        ContentError::Store(_) => ErrorCode::Internal,
    }
}
