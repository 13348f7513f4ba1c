//! What is wrong with a file, with the places.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::path::{Path, PathBuf};

use serde_saphyr::{Location, Spanned};

use super::raw::Field;

/// Everything found wrong with one file: never empty, in the order of the lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub errors: Vec<ConfigError>,
}

/// One thing wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// Counted from 1; 0 where it concerns the file as a whole.
    pub line: u64,
    /// Counted from 1; 0 where it is not known.
    pub column: u64,
    /// In plain words.
    pub reason: String,
}

impl std::error::Error for ConfigErrors {}

impl fmt::Display for ConfigErrors {
    /// One line each: `file:line:column: reason`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, error) in self.errors.iter().enumerate() {
            let separator = if n == 0 { "" } else { "\n" };
            write!(f, "{separator}{}:{error}", self.file.display())?;
        }
        Ok(())
    }
}

impl fmt::Display for ConfigError {
    /// `line:column: reason`, without what is not known.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "{}:", self.line)?;
        }
        if self.column > 0 {
            write!(f, "{}:", self.column)?;
        }
        write!(f, " {}", self.reason)
    }
}

/// Collects the problems of one file, so that one attempt shows all of them.
#[derive(Default)]
pub(super) struct Problems(Vec<ConfigError>);

impl Problems {
    pub(super) fn add(&mut self, at: Location, reason: impl Into<String>) {
        self.0.push(ConfigError { line: at.line(), column: at.column(), reason: reason.into() });
    }

    /// A field that this version knows and does not enforce: ignoring it could fail open.
    pub(super) fn unsupported(&mut self, at: Location, what: &str) {
        self.add(at, format!("{what} is not supported yet"));
    }

    /// The value of a field that the mapping at `owner` must have.
    pub(super) fn need<'f, T>(&mut self, field: &'f Field<T>, owner: Location, name: &str) -> Option<&'f Spanned<T>> {
        if field.0.is_none() {
            self.add(owner, format!("{name} is missing"));
        }
        field.0.as_ref()
    }

    /// The parsed value, or nothing and a problem.
    pub(super) fn parse<T>(
        &mut self,
        value: &Spanned<String>,
        name: &str,
        parser: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        parser(&value.value)
            .map_err(|reason| self.add(value.referenced, format!("{name} {:?} {reason}", value.value)))
            .ok()
    }

    /// The parsed value of a field that may be absent: its default then, and after a problem.
    pub(super) fn parse_or<T>(
        &mut self,
        field: &Field<String>,
        name: &str,
        parser: impl FnOnce(&str) -> Result<T, String>,
        default: T,
    ) -> T {
        field.0.as_ref().and_then(|value| self.parse(value, name, parser)).unwrap_or(default)
    }

    /// Notes `key`, or reports that it was there before.
    pub(super) fn unique<K: Hash + Eq>(&mut self, seen: &mut HashMap<K, Location>, key: K, at: Location, what: &str) {
        match seen.get(&key) {
            Some(first) => self.add(at, format!("{what} is given twice, first in line {}", first.line())),
            None => drop(seen.insert(key, at)),
        }
    }

    /// The value, where it could be built and nothing was wrong.
    pub(super) fn finish<T>(mut self, file: &Path, value: Option<T>) -> Result<T, ConfigErrors> {
        if let (Some(value), true) = (value, self.0.is_empty()) {
            return Ok(value);
        }
        self.0.sort_by_key(|error| (error.line, error.column));
        Err(ConfigErrors { file: file.into(), errors: self.0 })
    }
}
