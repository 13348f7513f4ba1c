//! PEM files. Errors name the file and nothing that stands in it: a key pasted onto its BEGIN line must not be logged.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::{Error as SyntaxError, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::{Zeroize, Zeroizing};

/// Why a PEM file gave nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum PemError {
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: larger than {MAX_BYTES} bytes", path.display())]
    TooLarge { path: PathBuf },
    #[error("{}: not well-formed PEM", path.display())]
    Syntax { path: PathBuf },
    #[error("{}: holds no {what}", path.display())]
    Empty { path: PathBuf, what: &'static str },
}

/// All certificates of a file, in its order; at least one.
pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let text = read(path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => Err(empty(path, "certificate")),
        Ok(certificates) => Ok(certificates),
        Err(_) => Err(PemError::Syntax { path: path.to_owned() }),
    }
}

/// The first private key of a file, as DER: PKCS#8, SEC1 or PKCS#1.
pub(super) fn private_key(path: &Path) -> Result<Zeroizing<Vec<u8>>, PemError> {
    let text = read(path)?;
    match PrivateKeyDer::from_pem_slice(&text) {
        Ok(mut key) => {
            let der = Zeroizing::new(key.secret_der().to_vec());
            key.zeroize();
            Ok(der)
        }
        Err(SyntaxError::NoItemsFound) => Err(empty(path, "private key (encrypted ones are not supported)")),
        Err(_) => Err(PemError::Syntax { path: path.to_owned() }),
    }
}

/// More than any bundle has; what is larger was put there by mistake.
const MAX_BYTES: u64 = 1 << 20;

fn empty(path: &Path, what: &'static str) -> PemError {
    PemError::Empty { path: path.to_owned(), what }
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, PemError> {
    let failed = |source| PemError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    // Room for all of it from the start: a buffer that grows leaves copies behind that are not zeroised.
    let length = file.metadata().map_err(failed)?.len().min(MAX_BYTES);
    let mut text = Zeroizing::new(Vec::with_capacity(usize::try_from(length).unwrap_or(0) + 1));
    file.by_ref().take(MAX_BYTES + 1).read_to_end(&mut text).map_err(failed)?;
    match u64::try_from(text.len()).is_ok_and(|length| length <= MAX_BYTES) {
        true => Ok(text),
        false => Err(PemError::TooLarge { path: path.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_file_and_keep_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        let error = private_key(&path).unwrap_err().to_string();
        assert!(error.contains("key.pem") && error.contains("No such file"), "{error}");

        for text in [
            "-----BEGIN PRIVATE KEY-----\\nSECRET\\n-----END PRIVATE KEY-----\n",
            "-----BEGIN PRIVATE KEY-----\nSECRET",
            "-----BEGIN PRIVATE KEY-----\n!SECRET!\n-----END PRIVATE KEY-----\n",
            "SECRET",
            "",
        ] {
            std::fs::write(&path, text).unwrap();
            let error = private_key(&path).unwrap_err();
            let shown = format!("{error} {error:?}");
            assert!(shown.contains("key.pem") && !shown.contains("SECRET"), "{shown}");
            assert!(certificates(&path).is_err());
        }
    }

    #[test]
    fn a_huge_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bundle.pem");
        File::create(&path).unwrap().set_len(MAX_BYTES + 1).unwrap();
        assert!(matches!(certificates(&path), Err(PemError::TooLarge { .. })));
    }
}
