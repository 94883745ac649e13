//! The NBD server. Under construction.
