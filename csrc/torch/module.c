// An empty Python module on the limited API: importing it loads this library, and with it registers the operators.
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

static struct PyModuleDef module = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "_C", .m_size = -1};

PyMODINIT_FUNC PyInit__C(void) {
  return PyModule_Create(&module);
}
