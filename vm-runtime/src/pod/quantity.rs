//! Kubernetes quantities (apimachinery, resource.Quantity): a decimal number and a suffix.

/// Why a text is no quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadQuantity {
    Form,
    TooLarge,
}

/// Most digits before and after the point, together: all of them fit 64 bits.
const MAX_DIGITS: usize = 18;

/// Parses a quantity into thousandths, rounded up.
pub(super) fn milli(text: &str) -> Result<u128, BadQuantity> {
    let end = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') {
        return Err(BadQuantity::Form);
    }
    if whole.len() + fraction.len() > MAX_DIGITS {
        return Err(BadQuantity::TooLarge);
    }
    // The suffix in thousandths.
    let unit: u128 = match suffix {
        "m" => 1,
        "" => 1000,
        "k" | "K" => 1000 * 1000,
        "M" => 1000 * 1000_u128.pow(2),
        "G" => 1000 * 1000_u128.pow(3),
        "T" => 1000 * 1000_u128.pow(4),
        "Ki" => 1000 << 10,
        "Mi" => 1000 << 20,
        "Gi" => 1000 << 30,
        "Ti" => 1000 << 40,
        _ => return Err(BadQuantity::Form),
    };
    let digits: String = [whole, fraction].concat();
    let digits: u128 = digits.parse().map_err(|_| BadQuantity::Form)?;
    // At most 60 bits times 50 bits: no overflow.
    Ok((digits * unit).div_ceil(10_u128.pow(fraction.len() as u32)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_those_of_kubernetes() {
        for (text, value) in [
            ("0", 0),
            ("1", 1000),
            ("500m", 500),
            ("0.5", 500),
            ("1.5Gi", (1000 * 1536) << 20),
            ("128Mi", (1000 * 128) << 20),
            ("64k", 64_000_000),
            ("64K", 64_000_000),
            ("1M", 1_000_000_000),
            ("2Ti", (1000 * 2) << 40),
            ("0.0001", 1),
            ("1.", 1000),
        ] {
            assert_eq!(milli(text), Ok(value), "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for text in [
            "", "Mi", ".5", "-1", "+1", "1 Mi", "1MiB", "1mi", "1e3", "1.2.3", "0x10", "1µ",
        ] {
            assert_eq!(milli(text), Err(BadQuantity::Form), "{text}");
        }
        assert_eq!(milli(&"9".repeat(40)), Err(BadQuantity::TooLarge));
    }
}
