//! Takes the maps out of the loaded programs.

use std::path::Path;

use aya::Ebpf;
use aya::maps::{Map, MapError};

use super::Cause;
use crate::network::error::GateError;
use crate::network::sys::MappedWords;

/// The programs, and the folder where their maps are pinned, for messages.
pub(super) struct Taker<'a> {
    pub(super) programs: &'a mut Ebpf,
    pub(super) dir: &'a Path,
}

impl Taker<'_> {
    /// A map as what it is said to be.
    pub(super) fn map<T>(
        &mut self,
        name: &'static str,
        typed: impl FnOnce(Map) -> Result<T, MapError>,
    ) -> Result<T, GateError> {
        typed(self.take(name)?).map_err(|error| self.error(name, error.into()))
    }

    /// An array of `len` words, mapped into memory.
    pub(super) fn words(&mut self, name: &'static str, len: u32) -> Result<MappedWords, GateError> {
        let Map::Array(data) = self.take(name)? else {
            return Err(GateError::Mismatch(name));
        };
        MappedWords::map(data.fd(), len as usize).map_err(|error| self.error(name, error.into()))
    }

    pub(super) fn error(&self, map: &'static str, source: Cause) -> GateError {
        GateError::Map {
            map,
            dir: self.dir.to_owned(),
            source,
        }
    }

    fn take(&mut self, name: &'static str) -> Result<Map, GateError> {
        self.programs
            .take_map(name)
            .ok_or(GateError::Mismatch(name))
    }
}
