"""Compressed frames of known pixels, one for each transfer syntax that medvision says it reads.

Three little images of 12 rows and 16 columns, with r and c the row and the column:

    wide    16 bit   40 r + 7 c + 5 ((r c) mod 3)
    smooth  12 bit   40 r + 7 c
    gentle   8 bit   9 r + 10 c

They were encoded once: RLE, JPEG and JPEG-LS by DCMTK 3.6.7 (dcmcrle, dcmcjpeg, dcmcjpls), JPEG
2000 by OpenJPEG and HTJ2K by OpenJPH, both through imagecodecs 2026.3.6; the comment beside each
frame names the command. Only OpenJPEG is also a decoder of ours, so that a decoder which errs the
same way as its own encoder is still caught for every other syntax.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EncodedSample:
    """One compressed frame: the image it shows, and by how many grey levels decoding may differ."""

    transfer_syntax_uid: str
    name: str
    image: str
    tolerance: int
    frame_base64: str


ENCODED_SAMPLES = (
    EncodedSample(  # dcmcrle
        "1.2.840.10008.1.2.5",
        "RLE",
        "wide",
        0,
        "AgAAAEAAAABgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAPEA"
        "8QDxAPEA9AD+AfoA+AH+APQB8QHxAfEB8QH3AfsCDwAHDhUcIyoxOD9GTVRbYmkPKDRAPUlVUl5qZ3N/fIiUkQ9Q"
        "YWNldnh6i42PoKKktbe5D3h/ho2Um6KpsLe+xczT2uEPoKy4tcHNytbi3+v39AAMCQ/I2dvd7vDyAwUHGBocLS8x"
        "D/D3/gUMExohKC82PURLUlkPGCQwLTlFQk5aV2NvbHiEgQ9AUVNVZmhqe31/kJKUpaepD2hvdn2Ei5KZoKeutbzD"
        "ytEPkJyopbG9usbSz9vn5PD8+Q+4ycvN3uDi8/X3CAoMHR8h",
    ),
    EncodedSample(  # dcmcjpeg +eb +q 98
        "1.2.840.10008.1.2.4.50",
        "JPEG baseline",
        "gentle",
        2,
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAEBAQEBAQEBAQEBAQEBAQIBAQEBAQIBAQECAgICAgICAgIDAwQDAwMD"
        "AwICAwQDAwQEBAQEAgMFBQQEBQQEBAT/wAALCAAMABABAREA/8QAFgABAQEAAAAAAAAAAAAAAAAACggJ/8QAIBAA"
        "AAMJAQAAAAAAAAAAAAAAAAglAQYHJDVBQ1Jhcf/aAAgBAQAAPwDBMpJW6YnaYvAoApJW6YnaYvBMpSYeuumSOl2c"
        "4FAFJh666ZI6XZzg/9k=",
    ),
    EncodedSample(  # dcmcjpeg +ee +q 98
        "1.2.840.10008.1.2.4.51",
        "JPEG extended, 12 bit",
        "smooth",
        4,
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAEBAQEBAQEBAQEBAQEBAQIBAQEBAQIBAQECAgICAgICAgIDAwQDAwMD"
        "AwICAwQDAwQEBAQEAgMFBQQEBQQEBAT/wQALDAAMABABAREA/8QAFgABAQEAAAAAAAAAAAAAAAAACQsO/8QAIhAA"
        "AAMHBQAAAAAAAAAAAAAAAAgnAwkKJDRDUkVhYmNx/9oACAEBAAA/AMKRl/hJqFM8dI84hwC/wk1CmeOkecRawL+7"
        "bKbIp/jeY7dIcAv7tspsin+N5jt0j//Z",
    ),
    EncodedSample(  # dcmcjpeg +el +sv 6
        "1.2.840.10008.1.2.4.57",
        "JPEG lossless",
        "wide",
        0,
        "/9j/4AAQSkZJRgABAQAAAQABAAD/wwALEAAMABABAREA/8QAGAABAQEBAQAAAAAAAAAAAAAABQQDBhD/2gAIAQEA"
        "BgAA9vvvvvvvvvvvvvvv1DLl7Ll7Ll7Ll7Ll/UM2rs2rs2rs2rs2r9RUovUovUovUovUov1DLl7Ll7Ll7Ll7Ll/U"
        "M2rs2rs2rs2rs2r9RUovUovUovUovUov1DLl7Ll7Ll7Ll7Ll/UM2rs2rs2rs2rs2r9RUovUovUovUovUov1DLl7L"
        "l7Ll7Ll7Ll/UM2rs2rs2rs2rs2r/AP/Z",
    ),
    EncodedSample(  # dcmcjpeg +e1
        "1.2.840.10008.1.2.4.70",
        "JPEG lossless, first order",
        "wide",
        0,
        "/9j/4AAQSkZJRgABAQAAAQABAAD/wwALEAAMABABAREA/8QAGQAAAwEBAQAAAAAAAAAAAAAAAgMEBQYQ/9oACAEB"
        "AAEAAPPe973ve973ve/qLLAssCywLLAssDqNEi0SLRItEi0SLqHve973ve973vf1FlgWWBZYFlgWWB1GiRaJFokW"
        "iRaJF1D3ve973ve973v6iywLLAssCywLLA6jRItEi0SLRItEi6h73ve973ve9739RZYFlgWWBZYFlgdRokWiRaJF"
        "okWiRf/Z",
    ),
    EncodedSample(  # dcmcjpls +el
        "1.2.840.10008.1.2.4.80",
        "JPEG-LS lossless",
        "wide",
        0,
        "/9j/9wALEAAMABABAREA//gADQH//wASAEMBFABA/9oACAEBAAAAAKBsDYFwNgXBMDwWCwOBsC4JgeCxQgxBaCYW"
        "ikLiUQj5COj46OgLFCWgHAqUgDAiUgGBpKAYEpQGBMTocOHDhw4MGDBgwYMGCEmSJFWRI1oo1oo1oogWSsoDAsoD"
        "AsIDAsIGBYQMB6RHHHHHHHHHHHHHHB1Gmm3mm3mm3om3otB6IhAwSEDAIQMAhAwCEDAtCnOc5znOc5znOGUC1l7W"
        "XtZe1l7WhM+QgYBCDAIQYBCDAIQYDP/Z",
    ),
    EncodedSample(  # dcmcjpls +en +md 2
        "1.2.840.10008.1.2.4.81",
        "JPEG-LS near-lossless",
        "wide",
        2,
        "/9j/9wALEAAMABABAREA//gADQH//wAYAE0BIgBA/9oACAEBAAIAAKAwOBgYDBwMCDBghgMDAxCCQ0DEiQYpIYpI"
        "5IoBEKQGBUgIFSAgqQEFSBBIRiQUKFCKBCKCFFBFHSlWUqylOKuqjoZAQWQIVQQVBBUCBzpQQSgimImJlBKdUXFX"
        "FbVbURnVCHIwqDAyCFkYpkQlCUzKUISEI3TLouy6fSNiQQJBAkEWmGiQ/9k=",
    ),
    EncodedSample(  # jpeg2k_encode(reversible=True)
        "1.2.840.10008.1.2.4.90",
        "JPEG 2000 lossless",
        "wide",
        0,
        "/0//UQApAAAAAAAQAAAADAAAAAAAAAAAAAAAEAAAAAwAAAAAAAAAAAABDwEB/1IADAAAAAEAAAQEAAH/XAAEQID/"
        "ZAAlAAFDcmVhdGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAAD8AAH/k9/4l1ASNlexqmqKfku9"
        "g4jpCgeaFZoRByglzXdMegQGrwQBGE2HDDXpFJzXECDKkUXDK36/7GIyGVzhZzKOU1z+MrDksbS/2F36kVSRfi4e"
        "w7MWkctYPcDNXFU0DDEFdCCeE2vKoJq7aC5sHONR7KAopXP5RDFeh+25w2m8uQ33KjMsr33uEKJPz8EkXL8A/P2X"
        "3q4m0Ui4cnKVbVFZWhc2HYnECPWxanv6QGtzTrjJiSh1GhMaTNAYFGBv6zmQMap3cZCOFvQeDPVC03me1jGo6Whq"
        "OjDxd7FDVXFDa4riYDT48BqB8r+R+R+R+R//2Q==",
    ),
    EncodedSample(  # jpeg2k_encode(level=92, reversible=False)
        "1.2.840.10008.1.2.4.91",
        "JPEG 2000",
        "wide",
        8,
        "/0//UQApAAAAAAAQAAAADAAAAAAAAAAAAAAAEAAAAAwAAAAAAAAAAAABDwEB/1IADQECAAEAAAQEAACI/1wABUKA"
        "AP9kACUAAUNyZWF0ZWQgYnkgT3BlbkpQRUcgdmVyc2lvbiAyLjUuNP+QAAoAAAAAALAAAf+T3/J8EjZXsapqin5L"
        "vYOI6QoHmhWaEQcoJc13THoEBq8EARhNhww16RSc1xAgypFFwyt+v+xiMhlc4WcyjlNc/jKw5LG0v9hd+pFUkX4u"
        "HsOzFpHLWD3AzVxVNAwxBXQgnhNryqCau2gubBzjUeygKKVz+UQxXoftucNpvLkN9yozLK997hCiT8/BJFy/APz9"
        "l96uJtFIuHJylW1RWVoXNh2J/9k=",
    ),
    EncodedSample(  # htj2k_encode(reversible=True)
        "1.2.840.10008.1.2.4.201",
        "HTJ2K lossless",
        "wide",
        0,
        "/0//UQApQAAAAAAQAAAADAAAAAAAAAAAAAAAEAAAAAwAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUE"
        "BEAB/1wAEyCIkJCQkJCQkJCQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAOcAAf+TwAAm"
        "af4FB3QAAMAAEsAAE0AAEYCAAQd0ALD+Agd0AABjAMAAE0AAEsAAEYCA1wAAVAAz/jIzAAUzAMAAFbAABXQAAVKQ"
        "AAAGEfJDP5gEtrcARuSyMJrsQAQge51iuAAl2DBG3+uZtgDAAC6CAAF08AALfNPMmDZjooBNADYBCCQ7QLIBkv4G"
        "GyySEvyuxY+Zpr0Ai4YhGoZgHiQAkAAQAmtBFipwFmShAmdR/gcgIPIDH5Q4kdZL4r4A7+m+p/ue/n/7/tv3ZW5r"
        "VtfEAcIfBn/PLhp1tsOdAP/Z",
    ),
    EncodedSample(  # htj2k_encode(reversible=True, tlm=True)
        "1.2.840.10008.1.2.4.202",
        "HTJ2K lossless RPCL",
        "wide",
        0,
        "/0//UQApQAAAAAAQAAAADAAAAAAAAAAAAAAAEAAAAAwAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUE"
        "BEAB/1wAEyCIkJCQkJCQkJCQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv9VAAoAYAAAAAAA5/+QAAoA"
        "AAAAAOcAAf+TwAAmaf4FB3QAAMAAEsAAE0AAEYCAAQd0ALD+Agd0AABjAMAAE0AAEsAAEYCA1wAAVAAz/jIzAAUz"
        "AMAAFbAABXQAAVKQAAAGEfJDP5gEtrcARuSyMJrsQAQge51iuAAl2DBG3+uZtgDAAC6CAAF08AALfNPMmDZjooBN"
        "ADYBCCQ7QLIBkv4GGyySEvyuxY+Zpr0Ai4YhGoZgHiQAkAAQAmtBFipwFmShAmdR/gcgIPIDH5Q4kdZL4r4A7+m+"
        "p/ue/n/7/tv3ZW5rVtfEAcIfBn/PLhp1tsOdAP/Z",
    ),
    EncodedSample(  # htj2k_encode(level=2e-5, reversible=False)
        "1.2.840.10008.1.2.4.203",
        "HTJ2K",
        "wide",
        4,
        "/0//UQApQAAAAAAQAAAADAAAAAAAAAAAAAAAEAAAAAwAAAAAAAAAAAABDwEB/1AACAACAAAAKf9SAAwAAgABAAUE"
        "BEAA/1wAIyKp5KnGqcapqKHUodShwZoHmgeaFpKBkoGS14peil6KFP9kABcAAU9wZW5KUEggVmVyIDAuMjYuMy7/"
        "kAAKAAAAAADVAAH/k8AAAnC3t/kHh3QAAMAABNAAATB8/gIHdAD0+wMHdADAAAmgAATAJNIBAnQA9/oAIjQAwAAV"
        "sAAFoQAATKp1DMXQwP4zf+lZlgBwhZdbbnl7weACT3MkMbcA6QPNmdUAwAAtyAAF0sAALcColGyMoFIDSI0AbUAs"
        "IPN0nR0JfSKMWb8ZdL0AWpaQUJSQUJQObACwAYhPV1jtkxVW+2SVAOQEHkBjgDVa1WqdANngPXjZ4WwDZhu8z94H"
        "77P1QAzKPqWHWmMDmwD/2Q==",
    ),
)
